"""Fine-tuning a teacher yields an ordinary model.

A finished or unfinished teacher is only replaced on request.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainerCallback

from pipeline.config import DataConfig, TrainTeacherConfig
from pipeline.errors import BadRowError, ContractError, MisuseError, SourceError, TrainingError
from pipeline.models import load_model
from pipeline.tasks import get_task
from pipeline.training import teacher as module
from pipeline.training.teacher import run as train_teacher
from tests.conftest import tiny_model


def config(tmp_path, model, data, **settings) -> TrainTeacherConfig:
    settings = {"epochs": 20, "learning_rate": 3e-3, "batch_size": 10, **settings}
    return TrainTeacherConfig(
        task="sequence-classification", model=str(model), data=data, **{"output": str(tmp_path / "out"), **settings}
    )


@pytest.fixture
def data(tmp_path, topics) -> DataConfig:
    (tmp_path / "data").mkdir()
    for split, rows in topics.items():
        rows.to_json(tmp_path / "data" / f"{split}.jsonl")
    return DataConfig(dataset=str(tmp_path / "data"))


def test_a_teacher_learns_its_task_and_is_an_ordinary_model(tmp_path, bert_tokenizer, data, save_teacher):
    pretrained = save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=2).bert, bert_tokenizer, "pretrained")
    metrics = train_teacher(config(tmp_path, pretrained, data))
    assert metrics["accuracy"] > 0.8
    teacher = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert teacher.config.label2id == {"business": 0, "film": 1, "sport": 2}
    kept = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert kept["split"] == "test"
    assert kept["rows"] == 72
    assert kept["measured_rows"] == Path(data.dataset, "test.jsonl").read_text().count("\n")
    assert kept["metrics"] == metrics
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("the cat")["input_ids"]
        == bert_tokenizer("the cat")["input_ids"]
    )


def test_a_class_that_no_row_has_is_told(tmp_path, bert_tokenizer, save_teacher, caplog):
    """Labels that start at 1 leave class 0 without rows."""
    pretrained = save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=2).bert, bert_tokenizer, "pretrained")
    rows = [{"text": text, "label": 1 + i % 2} for i, text in enumerate(["the cat", "the dog", "a film", "a goal"])]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = DataConfig(dataset=str(tmp_path / "train.jsonl"))
    train_teacher(config(tmp_path, pretrained, one, max_steps=1))
    assert "split train: 1 of 3 classes have no training row (0), but are classes of the teacher" in caplog.text
    caplog.clear()
    named = dataclasses.replace(
        one,
        label_map=(
            "1=cat",
            "2=dog",
        ),
    )
    train_teacher(config(tmp_path, pretrained, named, max_steps=1, output=str(tmp_path / "named")))
    assert AutoConfig.from_pretrained(tmp_path / "named").id2label == {0: "0", 1: "cat", 2: "dog"}


def test_classes_are_counted_and_rare_ones_are_warned_of(tmp_path, bert_tokenizer, save_teacher, caplog):
    """A misspelt label is a class of its own."""
    pretrained = save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=2).bert, bert_tokenizer, "pretrained")
    labels = ["cats"] * 7 + ["dogs"] * 6 + ["dog"]
    rows = [{"text": f"the {label} {i}", "label": label} for i, label in enumerate(labels)]
    for split, part in (("train", rows), ("test", [*rows[:2], {"text": "a film", "label": "film"}])):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    train_teacher(config(tmp_path, pretrained, DataConfig(dataset=str(tmp_path / "data")), max_steps=1))
    assert "split train: labels by class: cats 7, dogs 6, dog 1\n" in caplog.text
    assert "1 of 4 classes have no training row (film), but are classes of the teacher; label rows of" in caplog.text
    assert "1 of 4 classes have fewer than 5 labels (dog); if they are misspelt" in caplog.text


def test_a_label_column_that_train_spells_otherwise(tmp_path, bert_tokenizer, save_teacher, caplog):
    pretrained = save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=2).bert, bert_tokenizer, "pretrained")
    (tmp_path / "data").mkdir()
    for split, name in (("train", "label "), ("test", "label")):
        rows = [{"text": f"the cat {i}", name: i % 2} for i in range(4)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        SourceError, match=r"split train has no labelled row .*\(no column 'label'; found text, label \)"
    ):
        train_teacher(config(tmp_path, pretrained, DataConfig(dataset=str(tmp_path / "data")), max_steps=1))
    assert "split train: column 'label ' is not read as the label column 'label': its 4 rows have no" in caplog.text


def test_a_language_model_teacher_is_fine_tuned_too(tmp_path, lm_tokenizer, documents, save_teacher):
    (tmp_path / "data").mkdir()
    for split, rows in documents.items():
        rows.to_json(tmp_path / "data" / f"{split}.jsonl")
    model = save_teacher(tiny_model("llama", len(lm_tokenizer)), lm_tokenizer)
    settings = {
        "task": "causal-lm",
        "model": str(model),
        "output": str(tmp_path / "out"),
        "data": DataConfig(dataset=str(tmp_path / "data"), max_length=32),
    }
    untouched = train_teacher(TrainTeacherConfig(**settings, max_steps=1, learning_rate=0.0))
    with pytest.raises(MisuseError, match=f"{tmp_path / 'out'}: holds a finished model; .*--overwrite"):
        train_teacher(TrainTeacherConfig(**settings))
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    trained = train_teacher(TrainTeacherConfig(**settings, epochs=5, learning_rate=5e-3, overwrite=True))
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert trained["loss"] < untouched["loss"] - 1


def test_teachers_need_labels_and_a_split_to_learn_from(tmp_path, bert_tokenizer, data, save_teacher, topics):
    pretrained = save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=2).bert, bert_tokenizer, "pretrained")
    with pytest.raises(SourceError, match=r"no label column 'topic'.*--label-column"):
        train_teacher(config(tmp_path, pretrained, DataConfig(dataset=data.dataset, label_column="topic")))
    with pytest.raises(SourceError, match="expected a split `train`"):
        train_teacher(config(tmp_path, pretrained, DataConfig(dataset=data.dataset, split=("test",))))
    with pytest.raises(MisuseError, match="own directory"):
        train_teacher(
            TrainTeacherConfig(task="sequence-classification", model=str(pretrained), output=str(pretrained), data=data)
        )
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------- interrupted and resumed runs


@pytest.fixture
def pretrained(bert_tokenizer, save_teacher):
    """Save a model with dropout, so that a resumed run must restore the random number state."""
    model = tiny_model("bert", len(bert_tokenizer), num_labels=2, hidden_dropout_prob=0.2).bert
    return save_teacher(model, bert_tokenizer, "pretrained")


def weights(output: Path) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(output).state_dict()


def content(output: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in output.rglob("*") if path.is_file()}


@pytest.fixture
def stopped_at(monkeypatch):
    """Make a run stop before a step, as an error or a signal would."""

    def stop(step, action):
        class Stop(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == step:
                    action()

        plain = module.show_progress
        monkeypatch.setattr(
            module, "show_progress", lambda trainer, name: (plain(trainer, name), trainer.add_callback(Stop()))
        )

    return stop


class _Killed(BaseException):
    pass


def kill():
    raise _Killed


def test_the_same_command_goes_on_from_its_last_whole_checkpoint(
    tmp_path, data, pretrained, stopped_at, caplog, monkeypatch
):
    plain = config(tmp_path, pretrained, data, max_steps=6, training={"save_strategy": "steps", "save_steps": 2})
    out = tmp_path / "out"
    with monkeypatch.context():
        stopped_at(5, kill)
        with pytest.raises(_Killed):
            train_teacher(plain)
        monkeypatch.undo()
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    (out / "checkpoint-4" / "trainer_state.json").write_text("{")  # truncated
    before = content(out)
    for changed, named in (
        ({"seed": 1}, "seed"),
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"max_steps": 7}, r"course\.max_steps: expected 6, found 7; use another --output, the same settings"),
        ({"data": dataclasses.replace(data, label_map=("sport=Games",))}, r"label_names"),
        ({"data": dataclasses.replace(data, max_length=5)}, "rows_sha256"),
    ):
        with pytest.raises(ContractError, match=rf"another run that is not finished: {named}.*--overwrite") as caught:
            train_teacher(dataclasses.replace(plain, **changed))
        assert "--resume" not in str(caught.value)
    assert content(out) == before

    with caplog.at_level("INFO", logger="pipeline"):
        train_teacher(plain)
    assert "checkpoint-4: is incomplete; using" in caplog.text
    assert "resuming from checkpoint-2" in caplog.text
    train_teacher(dataclasses.replace(plain, output=str(tmp_path / "whole"), training={}))
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(out).items())
    with pytest.raises(MisuseError, match="holds a finished model"):
        train_teacher(plain)


def test_checkpoints_of_which_nothing_is_known_are_refused(tmp_path, data, pretrained, stopped_at, monkeypatch):
    plain = config(tmp_path, pretrained, data, max_steps=2)
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(MisuseError, match=r"holds the checkpoints of a run; .*--overwrite"):
        train_teacher(plain)
    train_teacher(dataclasses.replace(plain, overwrite=True))
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    (tmp_path / "out" / "metrics.json").unlink()  # as if stopped during evaluation
    with pytest.raises(ContractError, match="holds the weights of another run that is not finished: seed"):
        train_teacher(dataclasses.replace(plain, seed=1))
    train_teacher(plain)
    assert (tmp_path / "out" / "metrics.json").is_file()


def test_sigterm_saves_a_checkpoint_of_a_teacher_too(tmp_path, data, pretrained, stopped_at, monkeypatch):
    """No checkpoint is due, so that the signal alone writes one."""
    plain = config(tmp_path, pretrained, data, max_steps=4)
    noted = []
    before = signal.signal(signal.SIGTERM, lambda *_: noted.append(1))
    try:
        stopped_at(1, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as stop:
            train_teacher(plain)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (noted, stop.value.code) == ([1], 143)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    train_teacher(plain)
    train_teacher(dataclasses.replace(plain, output=str(tmp_path / "whole")))
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(tmp_path / "out").items())


def test_a_full_disk_while_a_teacher_is_saved_is_one_line(tmp_path, data, pretrained, monkeypatch):
    plain = Trainer._save_optimizer_and_scheduler

    def full(self, output_dir):
        if output_dir.endswith("checkpoint-2"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(self, output_dir)

    saving = config(tmp_path, pretrained, data, max_steps=2, training={"save_strategy": "steps", "save_steps": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(
            TrainingError, match=r"checkpoint-2: the disk is full.* run the same command again$"
        ) as caught:
            train_teacher(saving)
        assert "\n" not in str(caught.value)
    train_teacher(saving)
    assert (tmp_path / "out" / "metrics.json").is_file()


@pytest.mark.parametrize("training", [{"eval_strategy": "epoch"}, {"metric_for_best_model": "accuracy"}])
def test_settings_without_effect_on_a_teacher_are_refused_before_the_first_step(tmp_path, data, pretrained, training):
    with pytest.raises(MisuseError, match=f"training: {next(iter(training))}: .*evaluated once, at the end"):
        train_teacher(config(tmp_path, pretrained, data, training=training))
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_trained_further_keeps_its_labels(tmp_path, data, bert_tokenizer, save_teacher):
    peft = pytest.importorskip("peft")
    base = save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=3), bert_tokenizer, "base")
    model = AutoModelForSequenceClassification.from_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2)).save_pretrained(tmp_path / "adapter")
    train_teacher(config(tmp_path, tmp_path / "adapter", data, max_steps=1))
    found = load_model(get_task("sequence-classification"), str(tmp_path / "out"))
    assert found.model.config.id2label == {0: "business", 1: "film", 2: "sport"}


def test_rows_without_text_are_left_out_where_asked(tmp_path, bert_tokenizer, data, save_teacher, caplog):
    pretrained = save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=2).bert, bert_tokenizer, "pretrained")
    for split in ("train", "test"):
        with Path(data.dataset, f"{split}.jsonl").open("a") as handle:
            handle.write(json.dumps({"id": "empty", "text": "", "label": "film"}) + "\n")
    with pytest.raises(BadRowError, match="split train, row 90: text is empty; correct or remove the row"):
        train_teacher(config(tmp_path, pretrained, data, max_steps=1))
    train_teacher(config(tmp_path, pretrained, data, max_steps=1, on_bad_row="skip"))
    kept = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (kept["rows"], kept["measured_rows"]) == (72, 30)
    assert "split test: 1 rows are left out (--on-bad-row skip); the first is row 30: text is empty" in caplog.text
