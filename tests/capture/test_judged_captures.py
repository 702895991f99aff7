"""A language model as a judge labels texts by prompt: its cache, contract and students."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

import pipeline as softlabel
from pipeline.cache.format.manifest import Layout
from pipeline.capture import audit
from pipeline.capture.engines import in_process
from pipeline.capture.run import run
from pipeline.config import AuditConfig, CacheLogitsConfig, DataConfig, TrainStudentConfig
from pipeline.errors import ContractError, MisuseError, ModelError, SourceError
from pipeline.outlines.capture import outline
from pipeline.records import Columns, JudgeInfo
from pipeline.training.run import run as train
from tests.conftest import tiny_model
from tests.support.served import serving

TEMPLATE = "Text: {{ text }}\nOne of {{ labels | join(' or ') }}:"
WITH_SHOTS = "{% for shot in shots %}\n{{ shot.text }} = {{ shot.label }}\n{% endfor %}\n{{ text }} ="


@pytest.fixture
def tokenizer(lm_tokenizer):
    found = copy.deepcopy(lm_tokenizer)
    found.model_max_length = 256
    return found


@pytest.fixture
def model(tokenizer):
    return tiny_model("llama", len(tokenizer), spread=3.0)


@pytest.fixture
def config(tmp_path, tokenizer, model, topics, save_teacher):
    teacher = save_teacher(model, tokenizer)
    data = tmp_path / "data"
    data.mkdir()
    for split, rows in topics.items():
        rows.to_json(data / f"{split}.jsonl")
    template = tmp_path / "prompt.jinja"
    template.write_text(TEMPLATE)

    def make(output="cache", data_settings=None, **settings):
        return CacheLogitsConfig(
            task="sequence-classification",
            data=DataConfig(**{"dataset": str(data), "max_length": 30, **(data_settings or {})}),
            teacher=str(teacher),
            output=str(tmp_path / output),
            **{"rows_per_shard": 30, "prompt_template": str(template), **settings},
        )

    return make


@pytest.fixture
def few(config, tmp_path):
    """`config` with its data set reduced to 24 train and 6 test rows."""
    for split, rows in (("train", 24), ("test", 6)):
        file = tmp_path / "data" / f"{split}.jsonl"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:rows]))
    return config


def naive(model, tokenizer, prompt, labels):
    """Normalised log p(label | prompt) of each label, from one pass over each whole sequence."""
    ids = tokenizer(prompt)["input_ids"]
    found = []
    for label in labels:
        tail = tokenizer(label)["input_ids"]
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(torch.tensor([[*ids, *tail]])).logits[0].double(), -1)
        found.append(sum(logprobs[len(ids) - 1 + i, token] for i, token in enumerate(tail)))
    return torch.log_softmax(torch.stack(found), -1)


def test_soft_labels_are_the_softmax_over_labels(config, model, tokenizer):
    cache = run(config())
    assert cache.manifest.contract.label_names == ("business", "film", "sport")
    assert cache.manifest.contract.encoding.kind == "full"
    rows = [*cache.dataset("train"), *cache.dataset("test")]
    assert len(rows) == 120
    for row in rows[::7]:
        seen = tokenizer.decode(row.example.input_ids.tolist())
        assert row.example.text.startswith(seen)
        prompt = f"Text: {seen}\nOne of business or film or sport:"
        expected = naive(model, tokenizer, prompt, (" business", " film", " sport"))
        np.testing.assert_allclose(row.soft.top_logprobs, expected, atol=2e-4)
    assert any(row.example.label is None for row in rows)


def test_python_and_command_line_make_the_same(config, model, tokenizer, topics, tmp_path):
    one = run(
        config(
            label_text=("sport=goal", "film", "business"), shots=2, shot_tokens=5, calibrate=True, prompt_template=None
        )
    )
    other = softlabel.cache_logits(
        model,
        topics,
        tmp_path / "other",
        task="sequence-classification",
        tokenizer=tokenizer,
        max_length=30,
        label_text={"sport": "goal", "film": "film", "business": "business"},
        shots=2,
        shot_tokens=5,
        calibrate=True,
    )
    assert one.manifest.contract.teacher.judge == other.manifest.contract.teacher.judge
    for a, b in zip(one.dataset("test"), other.dataset("test"), strict=True):
        np.testing.assert_allclose(a.soft.top_logprobs, b.soft.top_logprobs, atol=1e-4)


def test_the_prompt_stands_in_the_contract(few, tmp_path):
    (tmp_path / "shots.jinja").write_text(WITH_SHOTS)
    cache = run(
        few(prompt_template=str(tmp_path / "shots.jinja"), label_text=("sport=goal", "film", "business"), shots=3)
    )
    found = cache.manifest.contract.teacher.judge
    assert found == JudgeInfo(tuple(WITH_SHOTS.split("\n")), "plain", ("goal", "film", "business"), found.shots, 64)
    assert len(found.shots) == 3
    assert all(place.startswith("train:") for place in found.shots)
    content = json.loads(Layout(tmp_path / "cache").manifest.read_text())
    assert content["contract"]["teacher"]["judge"]["label_texts"] == ["goal", "film", "business"]
    card = (cache.root / "README.md").read_text()
    assert "--shots 3" in card
    assert "--label-text sport=goal" in card


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"prompt_template": "default"}, "judge.template"),
        ({"label_text": ("business", "film", "sport=goal")}, "judge.label_texts"),
        ({"label_text": ("sport", "film", "business")}, "(label_names|teacher.judge.label_texts)"),
        ({"prompt_format": "chat"}, "judge.format"),
        ({"shots": 4, "shot_tokens": 4, "prompt_template": None}, "judge"),
        ({"calibrate": True}, "judge.calibrated"),
        ({"data_settings": {"max_length": 20}}, "tokenization.max_length"),
    ],
)
def test_a_resumed_capture_with_another_prompt_is_refused(few, tokenizer, tmp_path, monkeypatch, changed, named):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "teacher")

    class StoppedError(Exception):
        pass

    def stopped(*_):
        raise StoppedError

    monkeypatch.setattr(in_process, "capture_shards", stopped)
    with pytest.raises(StoppedError):
        run(few(prompt_format="plain"))
    with pytest.raises(StoppedError):
        run(few(prompt_format="plain"))
    with pytest.raises(ContractError, match=rf"cache: holds another capture: contract\.(teacher\.)?{named}"):
        run(few(**{"prompt_format": "plain", **changed}))


def test_new_rows_are_appended_with_the_examples_of_the_first(config, topics, tmp_path):
    (tmp_path / "shots.jinja").write_text(WITH_SHOTS)
    settings = {"prompt_template": str(tmp_path / "shots.jinja"), "shots": 6, "shot_tokens": 4}
    data = tmp_path / "data" / "train.jsonl"
    lines = data.read_text().splitlines(keepends=True)
    seen = []
    for rows in (30, 60, 90):
        data.write_text("".join(lines[:rows]))
        cache = run(config(**settings, append=rows > 30))
        assert len(cache.dataset("train")) == rows
        seen.append(cache.manifest.contract.teacher.judge.shots)
    assert seen == seen[:1] * 3
    assert run(config("whole", **settings)).manifest.contract.teacher.judge.shots not in seen
    with pytest.raises(ContractError, match=r"--append: seed: expected 0, found 1"):
        run(config(**settings, append=True, seed=1))


def test_long_texts_are_counted_and_shots_never_hold_the_row(config, tmp_path, caplog):
    (tmp_path / "shots.jinja").write_text(WITH_SHOTS)
    with caplog.at_level(logging.INFO):
        run(config(prompt_template=str(tmp_path / "shots.jinja"), shots=6, data_settings={"max_length": 12}))
    assert "rows were cut at the maximum length" in caplog.text


def test_its_accuracy_is_shown_before_the_first_shard(config, model, tokenizer, topics, caplog, tmp_path):
    with caplog.at_level(logging.INFO):
        run(config())
    (line,) = [r for r in caplog.records if "labelled rows of train right" in r.message]
    assert "of 72 labelled rows of train right (95% interval" in line.message
    assert "always 'business' would be right on 33.3%" in line.message
    assert line.levelno == logging.WARNING
    assert "not shown to be better than that one answer" in line.message
    assert "the prompt of a row: 'Text: " in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run(config())  # already finished
    assert "labelled rows of train right" not in caplog.text


def taught(config):
    """The texts, the judge's own answer for each as its label, and the label names."""
    cache = run(config("first", calibrate=True))
    rows = [*cache.dataset("train"), *cache.dataset("test")]
    answers = [int(row.soft.top_logprobs.argmax()) for row in rows]
    assert min(np.bincount(answers, minlength=3)) >= 8
    return [row.example.text for row in rows], answers, cache.manifest.contract.label_names


def test_a_judge_that_is_right_and_numbers_in_another_order(config, model, tokenizer, tmp_path, caplog):
    texts, answers, names = taught(config)
    data = DatasetDict({"train": Dataset.from_dict({"text": texts, "label": [names[a] for a in answers]})})
    settings = {
        "task": "sequence-classification",
        "tokenizer": tokenizer,
        "max_length": 30,
        "prompt_template": TEMPLATE,
    }
    caplog.clear()
    with caplog.at_level(logging.INFO):
        softlabel.cache_logits(model, data, tmp_path / "right", calibrate=True, **settings)
    (line,) = [r for r in caplog.records if "labelled rows of train right" in r.message]
    assert "labels 100.0% of 120 labelled rows" in line.message
    assert line.levelno == logging.INFO
    moved = DatasetDict({"train": Dataset.from_dict({"text": texts, "label": [(a + 1) % 3 for a in answers]})})
    with pytest.raises(SourceError, match="classes are in another order than the teacher's"):
        softlabel.cache_logits(model, moved, tmp_path / "moved", calibrate=True, label_text=names, **settings)


def test_data_without_labels(config, model, tokenizer, topics, caplog, tmp_path):
    bare = DatasetDict({"train": topics["train"].remove_columns("label")})
    with caplog.at_level(logging.INFO):
        cache = softlabel.cache_logits(
            model,
            bare,
            tmp_path / "bare",
            task="sequence-classification",
            tokenizer=tokenizer,
            columns=Columns(label=None),
            prompt_template=TEMPLATE,
            label_text=["business", "film", "sport"],
            max_length=30,
        )
    assert "no labelled rows to measure the teacher on" in caplog.text
    assert len(cache.dataset("train")) == 90


def test_labels_that_are_not_among_the_texts(few):
    with pytest.raises(SourceError, match=r"unknown label 'sport'.*--label-map DATA=MODEL"):
        run(few(label_text=("business", "film")))
    cache = run(few(label_text=("business", "rest"), data_settings={"label_map": ("sport=rest", "film=rest")}))
    assert cache.manifest.contract.num_classes == 2
    assert {row.example.label for row in cache.dataset("test")} == {0, 1}


@pytest.mark.full
@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_behind_a_server_it_is_the_same(few, model, api):
    local = run(few("local", shots=2, shot_tokens=5, prompt_template="default", calibrate=True))
    with serving(model, api=api) as stand_in:
        settings = {"server": (stand_in.url,), "server_patience": 10.0}
        found = run(few("served", shots=2, shot_tokens=5, prompt_template="default", calibrate=True, **settings))
    contract = found.manifest.contract
    assert contract.teacher.judge == local.manifest.contract.teacher.judge
    assert contract.teacher.server.api == api
    assert contract.encoding.kind == "full"
    for split in local.splits:
        for a, b in zip(local.dataset(split), found.dataset(split), strict=True):
            assert a.example.input_ids.tolist() == b.example.input_ids.tolist()
            np.testing.assert_allclose(a.soft.top_logprobs, b.soft.top_logprobs, atol=1e-3)


@pytest.mark.full
def test_a_prompt_that_the_server_refuses_is_a_bad_row(few, model, caplog):
    with serving(model) as stand_in:
        whole = run(few("whole", server=(stand_in.url,), server_patience=5.0))
        described = stand_in.get("/v1/models")
        stand_in.get = lambda path: described if path == "/v1/models" else {"version": stand_in.version}
        stand_in.longest = max(len(body["prompt"]) for body in stand_in.asked)  # not in /v1/models
        with caplog.at_level(logging.WARNING):
            found = run(few("skipped", server=(stand_in.url,), server_patience=5.0, on_bad_row="skip"))
    assert 0 < found.manifest.bad_rows < 20
    assert len(found.dataset("train")) + len(found.dataset("test")) == 30 - found.manifest.bad_rows
    assert len(whole.dataset("train")) == 24
    assert "a prompt was refused: " in caplog.text


def test_a_student_of_another_tokenizer_learns_from_it(few, bert_tokenizer, tmp_path, save_teacher):
    cache = run(few())
    student = save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=3), bert_tokenizer, "student")
    result = train(
        TrainStudentConfig(
            cache=str(cache.root),
            student=str(student),
            output=str(tmp_path / "out"),
            max_steps=3,
            batch_size=4,
            hard_weight=0.0,
            soft_weight=1.0,
        )
    )
    assert result.steps == 3
    assert np.isfinite(result.soft_loss)


def test_a_student_of_the_same_tokenizer_learns_from_the_texts_ids(few, tokenizer, tmp_path, save_teacher):
    cache = run(few())
    student = save_teacher(tiny_model("llama", len(tokenizer), num_labels=3), tokenizer, "student")
    result = train(
        TrainStudentConfig(
            cache=str(cache.root), student=str(student), output=str(tmp_path / "out"), max_steps=2, batch_size=4
        )
    )
    assert result.steps == 2


def test_dry_run_and_refusals(few, tmp_path):
    lines = dict(outline(few(prompt_template=None, shots=2, shot_tokens=5)))
    assert "labels by prompt (plain, 2 examples)" in lines["teacher"]
    assert not (tmp_path / "cache").exists()
    cache = run(few())
    with pytest.raises(MisuseError, match="teacher was a language model with a prompt, which audit does not support"):
        audit.run(AuditConfig(cache=str(cache.root), teacher=str(tmp_path / "teacher")))
    with pytest.raises(MisuseError, match="--auto-batch-tokens does not measure prompts; give --batch-tokens"):
        run(few("measured", auto_batch_tokens=True))
    with pytest.raises(ModelError, match="--prompt-template default"):
        run(few("none", prompt_template=None))
    with pytest.raises(MisuseError, match="--calibrate is for a language model that labels by prompt"):
        few(prompt_template=None, calibrate=True)
    with pytest.raises(MisuseError, match="--shots: expected at least 0, found -1"):
        few(shots=-1)
    with pytest.raises(MisuseError, match="are for class labels; --task causal-lm has none"):
        run(
            CacheLogitsConfig(
                **{
                    **{f: getattr(few("lm"), f) for f in ("data", "teacher", "output")},
                    "task": "causal-lm",
                    "shots": 2,
                }
            )
        )
