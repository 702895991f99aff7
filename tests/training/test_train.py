"""Stage 2: a student trains from the cache alone, in an order independent of ranks."""

from __future__ import annotations

import builtins
import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainingArguments

import pipeline as softlabel
from pipeline.cache import Cache
from pipeline.config import TrainStudentConfig
from pipeline.errors import CacheError, ContractError, EncodingError, MisuseError, ModelError, TrainingError
from pipeline.models.arguments import training_arguments
from pipeline.records import Full, Sampled, TopK
from pipeline.training.batches.collate import Collator, TrainingRows
from pipeline.training.batches.order import BatchOrder
from pipeline.training.run import run
from tests.conftest import tiny_model
from tests.support.once import once
from tests.support.processes import python
from tests.support.profile import in_full
from tests.support.rows import build_cache

NAMES = {0: "business", 1: "sport", 2: "film"}


@pytest.fixture
def teacher(bert_tokenizer, save_teacher):
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3, spread=4.0)
    model.config.id2label, model.config.label2id = NAMES, {name: i for i, name in NAMES.items()}
    return save_teacher(model, bert_tokenizer)


@pytest.fixture
def cache(tmp_path, teacher, topics) -> Cache:
    def make(folder: Path) -> None:
        softlabel.cache_logits(
            str(teacher), topics, folder / "cache", task="sequence-classification", rows_per_shard=25
        )

    once((__name__, "cache"), make, tmp_path)
    return Cache.open(tmp_path / "cache")


@pytest.fixture
def lm_cache(tmp_path, lm_tokenizer, documents) -> Cache:
    def make(folder: Path) -> None:
        path = folder / "lm-teacher"
        tiny_model("llama", len(lm_tokenizer), spread=4.0).save_pretrained(path)
        lm_tokenizer.save_pretrained(path)
        softlabel.cache_logits(str(path), documents, folder / "lm-cache", task="causal-lm", max_length=32)

    once((__name__, "lm_cache"), make, tmp_path)
    return Cache.open(tmp_path / "lm-cache")


def student_of(teacher: Path, output: Path) -> Path:
    return softlabel.init_student(teacher, output, config=softlabel.Shape(1, 16, 2))


def config(cache: Cache, student: Path, output: Path, **settings) -> TrainStudentConfig:
    settings = {"max_steps": 5, "batch_size": 8, "learning_rate": 1e-3, **settings}
    return TrainStudentConfig(cache=str(cache.root), student=str(student), output=str(output), **settings)


def test_a_student_trains_with_the_teacher_deleted_and_opens_nothing_else(tmp_path, cache, teacher, monkeypatch):
    student = student_of(teacher, tmp_path / "init")
    shutil.rmtree(teacher)
    opened: list[str] = []
    plain_open = builtins.open

    def watch(file, *args, **kwargs):
        opened.append(str(file))
        return plain_open(file, *args, **kwargs)

    loaded = []
    for auto in (AutoModelForSequenceClassification, AutoModelForCausalLM):
        plain = auto.from_pretrained
        monkeypatch.setattr(
            auto,
            "from_pretrained",
            lambda name, *a, _plain=plain, **k: loaded.append(str(name)) or _plain(name, *a, **k),
        )
    monkeypatch.setattr(builtins, "open", watch)
    result = run(config(cache, student, tmp_path / "out"))
    assert loaded == [str(student)]
    assert not [name for name in opened if str(teacher) + "/" in name]
    assert result.steps == 5
    assert result.cache_id == cache.manifest.cache_id
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert again.config.num_labels == 3
    assert json.loads((tmp_path / "out" / "distillation.json").read_text())["cache_id"] == cache.manifest.cache_id


def test_importing_training_does_not_import_capture():
    """Runs in a forked process, after removing this project's modules."""
    code = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] in ("pipeline", "tests")]:
    del sys.modules[name]
import pipeline.training
print([name for name in sys.modules if name.startswith("pipeline.capture")], "pipeline.training.trainer" in sys.modules)
"""
    assert python("-c", code).stdout.split() == ["[]", "True"]


def test_a_student_comes_close_to_its_teacher(tmp_path, cache, teacher):
    """The student has the teacher's shape and trains on soft labels alone.

    Its KL falls to a small fraction of the initial value.
    """
    student = softlabel.init_student(teacher, tmp_path / "init", config=softlabel.Shape(2, 32, 2))
    before = softlabel.evaluate(cache, {"s": student}, split="train").students[0].kl
    run(
        config(
            cache,
            student,
            tmp_path / "out",
            hard_weight=0.0,
            soft_weight=1.0,
            temperature=1.0,
            max_steps=150,
            learning_rate=3e-3,
            batch_size=30,
        )
    )
    after = softlabel.evaluate(cache, {"s": tmp_path / "out"}, split="train").students[0].kl
    assert after < 0.2 * before


def test_labels_alone_train_on_the_labelled_rows_alone(tmp_path, cache, teacher):
    student = student_of(teacher, tmp_path / "init")
    from pipeline.training.trainer import DistillationTrainer

    model = AutoModelForSequenceClassification.from_pretrained(student)
    args = training_arguments(str(tmp_path / "out"), {})
    trainer = DistillationTrainer(model, args, cache=cache, loss=softlabel.Loss(1.0, 0.0))
    rows = [i for batch in trainer.get_train_dataloader().batch_sampler for i in batch]
    labels = [row.example.label for row in cache.dataset("train")]
    assert sorted(rows) == [i for i, label in enumerate(labels) if label is not None]
    everything = DistillationTrainer(model, args, cache=cache, loss=softlabel.Loss(0.5, 0.5))
    assert len([i for batch in everything.get_train_dataloader().batch_sampler for i in batch]) == 90


def test_the_teachers_hard_labels_stand_for_the_datas(cache):
    from pipeline.tasks import get_task

    rows = list(cache.dataset("train"))
    collator = Collator(get_task("sequence-classification"), cache.tokenizer, 1.0, teacher_labels=True)
    batch = collator.collate_block(next(cache.dataset("train").blocks(len(rows))))
    expected = [int(row.soft.top_ids[row.soft.top_logprobs.argmax()]) for row in rows]
    assert batch.labels.tolist() == expected


def test_a_student_with_another_tokenizer_trains_from_the_stored_text(tmp_path, cache, lm_tokenizer, save_teacher):
    model = tiny_model("gpt2", len(lm_tokenizer), num_labels=3)
    student = save_teacher(model, lm_tokenizer, "other")
    result = run(config(cache, student, tmp_path / "out"))
    assert result.steps == 5
    report = softlabel.evaluate(cache, {"other": tmp_path / "out"})
    assert 0 <= report.students[0].metrics["accuracy"] <= 1
    rows = list(cache.dataset("test"))
    from pipeline.records import Tokenization
    from pipeline.tasks import get_task

    collator = Collator(get_task("sequence-classification"), lm_tokenizer, 1.0, retokenize=Tokenization(64))
    batch = collator.collate_block(next(cache.dataset("test").blocks(len(rows))))
    assert (
        batch.inputs["input_ids"][0][: len(lm_tokenizer(rows[0].example.text)["input_ids"])].tolist()
        == lm_tokenizer(rows[0].example.text)["input_ids"]
    )


@pytest.mark.parametrize("encoding", [Sampled(8.0), *in_full(TopK(6), Full())], ids=lambda e: e.kind)
def test_language_model_students_train_from_every_encoding(tmp_path, lm_tokenizer, documents, save_teacher, encoding):
    path = save_teacher(tiny_model("llama", len(lm_tokenizer), spread=4.0), lm_tokenizer)
    cache = softlabel.cache_logits(
        str(path), documents, tmp_path / "c", task="causal-lm", max_length=32, encoding=encoding
    )
    student = softlabel.init_student(path, tmp_path / "init", layers=[0, 3])
    before = softlabel.evaluate(cache, {"s": student}).students[0]
    run(config(cache, student, tmp_path / "out", hard_weight=0.0, soft_weight=1.0, max_steps=60, learning_rate=3e-3))
    after = softlabel.evaluate(cache, {"s": tmp_path / "out"}).students[0]
    assert after.kl < 0.8 * before.kl


def test_a_lora_student_and_a_full_student_train_from_one_cache(tmp_path, lm_cache, documents):
    from peft import PeftModel

    teacher = tmp_path / "lm-teacher"
    student = softlabel.init_student(teacher, tmp_path / "init", layers=[0, 1])
    full = run(config(lm_cache, student, tmp_path / "full"))
    lora = run(config(lm_cache, student, tmp_path / "lora", lora_r=4))
    assert full.num_trainable == full.num_parameters
    assert 0 < lora.num_trainable < 0.2 * lora.num_parameters
    base = AutoModelForCausalLM.from_pretrained(student)
    adapted = PeftModel.from_pretrained(base, tmp_path / "lora")
    report = softlabel.evaluate(lm_cache, {"lora": tmp_path / "lora", "full": tmp_path / "full"})
    assert np.isfinite(report.students[0].kl)
    further = run(config(lm_cache, tmp_path / "lora", tmp_path / "lora2"))  # students may be adapters
    assert further.num_trainable == lora.num_trainable
    assert adapted.peft_config["default"].r == 4


def test_a_peft_adapter_is_a_teacher_too(tmp_path, lm_cache, documents):
    teacher = tmp_path / "lm-teacher"
    run(config(lm_cache, teacher, tmp_path / "adapter", lora_r=4, learning_rate=1e-2))
    cache = softlabel.cache_logits(
        str(tmp_path / "adapter"), documents["test"], tmp_path / "c2", task="causal-lm", max_length=32, encoding=Full()
    )
    assert cache.manifest.contract.teacher.adapter_sha256 is not None
    assert cache.manifest.contract.teacher.weights_sha256 == lm_cache.manifest.contract.teacher.weights_sha256


def test_gradient_accumulation_and_batch_size_give_the_same_steps(tmp_path, cache, teacher):
    """One batch of 8 and four accumulated batches of 2 end with the same weights.

    The small batches have unequal counts of labels.
    """
    student = student_of(teacher, tmp_path / "init")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    text = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**text, **still}))
    whole = run(config(cache, student, tmp_path / "whole", batch_size=8, training={"optim": "sgd"}))
    parts = run(
        config(
            cache,
            student,
            tmp_path / "parts",
            batch_size=2,
            training={"optim": "sgd", "gradient_accumulation_steps": 4},
        )
    )
    assert whole.steps == parts.steps
    one, other = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-6, rtol=1e-5)


def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path, cache, teacher):
    student = student_of(teacher, tmp_path / "init")
    settings = {"max_steps": 14, "training": {"save_steps": 4, "lr_scheduler_type": "constant"}}
    run(config(cache, student, tmp_path / "whole", **settings))
    run(config(cache, student, tmp_path / "parts", **{**settings, "max_steps": 8}))
    done = run(config(cache, student, tmp_path / "parts", resume=True, **settings))
    assert done.steps == 14
    one, other = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts")
    )
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# ----------------------------------------------------------------------------------- training order


@pytest.fixture
def rows(tmp_path, lm_tokenizer):
    return build_cache(tmp_path / "rows", lm_tokenizer, encoding=TopK(2), per_shard=37, shards=3).dataset("train")


def test_a_filler_row_weighs_nothing(rows):
    from pipeline.tasks import get_task

    collator = Collator(get_task("causal-lm"), Cache.open(rows.root).tokenizer, 1.0)
    batch = collator.collate(TrainingRows(rows).__getitems__([3, ~3]))
    half = len(batch.labels) // 2
    assert batch.weights.tolist() == [1.0] * half + [0.0] * half
    assert (batch.labels[half:] == -100).all()


# ------------------------------------------------------------------------------------ invalid input


def test_students_that_do_not_fit_are_refused(tmp_path, cache, lm_cache, bert_tokenizer, lm_tokenizer, save_teacher):
    other = tiny_model("bert", len(bert_tokenizer), num_labels=4)
    with pytest.raises(ContractError, match=r"expected 3 labels.*found 4"):
        run(config(cache, save_teacher(other, bert_tokenizer, "four"), tmp_path / "o"))
    swapped = tiny_model("bert", len(bert_tokenizer), num_labels=3)
    swapped.config.id2label = {0: "sport", 1: "business", 2: "film"}
    with pytest.raises(ContractError, match=r"label 0: expected 'business'.*found 'sport'"):
        run(config(cache, save_teacher(swapped, bert_tokenizer, "swapped"), tmp_path / "o"))
    short = tiny_model("gpt2", len(lm_tokenizer), n_positions=20)
    with pytest.raises(ContractError, match=r"at most 20 tokens.*up to 32"):
        run(config(lm_cache, save_teacher(short, lm_tokenizer, "short"), tmp_path / "o"))
    small = tiny_model("gpt2", len(lm_tokenizer) - 9)
    with pytest.raises(ContractError, match="expected 320 classes"):
        run(config(lm_cache, save_teacher(small, lm_tokenizer, "small"), tmp_path / "o"))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"split": "dev"}, CacheError, "no split 'dev'"),
        ({"student": "./nothing/here"}, ModelError, "no such directory"),
        ({"training": {"weight_decai": 0.1}}, softlabel.PipelineError, "did you mean 'weight_decay'"),
        ({"lora_r": 2, "lora_target": ("nothing",)}, ModelError, "--lora-target"),
        ({"learning_rate": 1e30, "training": {"max_grad_norm": 0}}, TrainingError, "step .*expected a finite loss"),
    ],
)
def test_bad_settings(tmp_path, cache, teacher, settings, error, message):
    student = settings.pop("student", None) or student_of(teacher, tmp_path / "init")
    with pytest.raises(error, match=message):
        run(config(cache, student, tmp_path / "o", **{"max_steps": 30, **settings}))


def test_a_temperature_that_the_cache_does_not_serve(tmp_path, lm_cache):
    student = softlabel.init_student(tmp_path / "lm-teacher", tmp_path / "init", layers=[0])
    with pytest.raises(EncodingError, match="--temperature 2: a cache with encoding sampled serves 1"):
        run(config(lm_cache, student, tmp_path / "o", temperature=2.0))


def test_training_does_not_overwrite_its_own_student(tmp_path, cache, teacher):
    student = student_of(teacher, tmp_path / "init")
    with pytest.raises(MisuseError, match="holds the student itself"):
        run(config(cache, student, student))


def test_training_overwrites_no_model_that_it_has_not_made(tmp_path, cache, teacher):
    student = student_of(teacher, tmp_path / "init")
    before = (teacher / "model.safetensors").read_bytes()
    with pytest.raises(MisuseError, match="has not made"):
        run(config(cache, student, teacher))
    assert (teacher / "model.safetensors").read_bytes() == before


def test_live_objects_train_without_a_file_named(tmp_path, cache, bert_tokenizer):
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3)
    args = TrainingArguments(output_dir=str(tmp_path / "x"), max_steps=2, report_to="none", disable_tqdm=True)
    result = softlabel.train_student(
        cache, model, tmp_path / "out", loss=softlabel.Loss(0.2, 0.8, temperature=3.0), args=args
    )
    assert result.steps == 2
    assert not (tmp_path / "x").exists()


def test_a_torn_checkpoint_falls_back_to_the_whole_one_before(tmp_path, cache, teacher):
    student = student_of(teacher, tmp_path / "init")
    settings = {"max_steps": 12, "training": {"save_steps": 4, "lr_scheduler_type": "constant"}}
    run(config(cache, student, tmp_path / "whole", **settings))
    run(config(cache, student, tmp_path / "parts", **{**settings, "max_steps": 8}))
    (tmp_path / "parts" / "checkpoint-8" / "trainer_state.json").write_text('{"half')
    done = run(config(cache, student, tmp_path / "parts", resume=True, **settings))
    assert done.steps == 12
    one, other = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts")
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_resumed_run_on_another_cache_or_loss_is_refused(tmp_path, cache, teacher, topics):
    student = student_of(teacher, tmp_path / "init")
    settings = {"max_steps": 4, "training": {"save_steps": 2}}
    run(config(cache, student, tmp_path / "o", **settings))
    other = softlabel.cache_logits(
        str(teacher), topics, tmp_path / "other", task="sequence-classification", encoding=TopK(2)
    )
    with pytest.raises(ContractError, match="cache_id"):
        run(config(other, student, tmp_path / "o", resume=True, **settings))
    with pytest.raises(ContractError, match=r"loss\.soft_weight"):
        run(config(cache, student, tmp_path / "o", resume=True, soft_weight=0.7, **settings))


def test_training_anew_leaves_nothing_of_the_run_before(tmp_path, lm_cache):
    student = softlabel.init_student(tmp_path / "lm-teacher", tmp_path / "init", layers=[0, 1])
    run(config(lm_cache, student, tmp_path / "o", lora_r=4, training={"save_steps": 2}))
    run(config(lm_cache, student, tmp_path / "o", overwrite=True))
    left = {path.name for path in (tmp_path / "o").iterdir()}
    assert not [name for name in left if name.startswith(("adapter", "checkpoint-4", "checkpoint-2"))]
    assert softlabel.evaluate(lm_cache, {"s": tmp_path / "o"}).students[0].num_parameters > 0


def test_evaluation_during_training_is_trainers(tmp_path, cache, teacher):
    student = student_of(teacher, tmp_path / "init")
    training = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    }
    with pytest.raises(MisuseError, match=r"no split `validation`.*--eval-split"):
        run(config(cache, student, tmp_path / "o", training=training))
    run(config(cache, student, tmp_path / "o", max_steps=6, eval_split="test", training=training))
    state = json.loads((tmp_path / "o" / "checkpoint-6" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [2, 4, 6]
    assert state["best_metric"] == min(entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry)


def test_labels_alone_train_from_a_grid_without_temperature_one(tmp_path, teacher, topics):
    cache = softlabel.cache_logits(
        str(teacher), topics, tmp_path / "c", task="sequence-classification", encoding=TopK(2, (2.0, 4.0))
    )
    student = student_of(teacher, tmp_path / "init")
    assert run(config(cache, student, tmp_path / "o", hard_weight=1.0, soft_weight=0.0)).soft_loss is None


def test_a_live_student_is_left_as_it_was(tmp_path, lm_cache, lm_tokenizer):
    """Its forward is restored, and its use_cache setting is saved unchanged."""
    student = tiny_model("llama", len(lm_tokenizer), seed=3)
    args = TrainingArguments(str(tmp_path / "live"), max_steps=2, bf16=True, use_cpu=True, report_to="none")
    softlabel.train_student(lm_cache, student, tmp_path / "live", args=args)
    assert "forward" not in student.__dict__
    assert "_original_forward" not in student.__dict__
    copied = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        assert not copied(input_ids=torch.tensor([[5, 6]])).logits.any()


@pytest.mark.parametrize("use_cache", [True, False])
def test_use_cache_is_saved_as_it_came(tmp_path, lm_cache, lm_tokenizer, save_teacher, use_cache):
    student = tiny_model("llama", len(lm_tokenizer), seed=3)
    student.config.use_cache = use_cache
    start = save_teacher(student, lm_tokenizer, "start")
    run(config(lm_cache, start, tmp_path / "out", max_steps=1, batch_size=2))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"] is use_cache
    layers = softlabel.init_student(start, tmp_path / "layers", layers=[0, 1])
    assert json.loads((layers / "config.json").read_text())["use_cache"] is use_cache


@pytest.mark.parametrize(("came", "asked"), [("bfloat16", "auto"), ("float32", "auto"), ("float32", "float16")])
def test_the_student_is_saved_in_its_own_precision_or_the_one_asked_for(
    tmp_path, lm_cache, lm_tokenizer, save_teacher, came, asked
):
    start = save_teacher(tiny_model("llama", len(lm_tokenizer)).to(getattr(torch, came)), lm_tokenizer, "start")
    expected = came if asked == "auto" else asked
    result = run(config(lm_cache, start, tmp_path / "out", max_steps=2, save_dtype=asked, eval_split="test"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {str(parameter.dtype) for parameter in saved.parameters()} == {f"torch.{expected}"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == expected
    line = softlabel.evaluate(lm_cache, {"s": tmp_path / "out"}, split="test").students[
        0
    ]  # the metrics are those of the saved model
    assert result.metrics["nll"] == pytest.approx(line.metrics["loss"], rel=1e-5)


def test_several_splits_are_one_set_of_rows(tmp_path, cache, teacher):
    """Every row of both splits occurs once per epoch, in an order that a resumed run continues."""
    student = student_of(teacher, tmp_path / "init")
    both = {"split": ("train", "test"), "max_steps": -1, "epochs": 1, "training": {"save_steps": 7}}
    whole = run(config(cache, student, tmp_path / "whole", **both))
    assert (whole.steps, whole.rows, whole.split) == (15, 120, "train, test")
    assert "splits `train` and `test`: 120 rows" in (tmp_path / "whole" / "README.md").read_text()
    order = BatchOrder(cache.dataset(("train", "test"), window=64), 8, seed=0)
    assert sorted(row for batch in order for row in batch) == list(range(120))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-15")
    run(config(cache, student, tmp_path / "parts", resume=True, **both))
    ends = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert ends[0] == ends[1]
    with pytest.raises(ContractError, match=r"split: expected .train, test., found .train."):
        run(config(cache, student, tmp_path / "parts", resume=True, **{**both, "split": "train"}))
    with pytest.raises(CacheError, match="no split 'dev'"):
        run(config(cache, student, tmp_path / "x", split=("train", "dev")))
    with pytest.raises(MisuseError, match="each once, found train, train"):
        config(cache, student, tmp_path / "x", split=("train", "train"))


def test_validation_is_not_evaluated_on_where_it_is_trained_on(tmp_path, teacher, topics):
    rows = DatasetDict({"train": topics["train"], "validation": topics["test"]})
    cache = softlabel.cache_logits(str(teacher), rows, tmp_path / "cache", task="sequence-classification")
    student = student_of(teacher, tmp_path / "init")
    alone = run(config(cache, student, tmp_path / "alone"))
    assert (alone.eval_split, alone.eval_rows) == ("validation", 30)
    both = run(config(cache, student, tmp_path / "both", split=("train", "validation")))
    assert (both.eval_split, both.eval_rows, both.metrics) == (None, None, {})
