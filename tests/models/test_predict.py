"""`softlabel predict` agrees with the evaluation and with `transformers.pipeline`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import pipeline as softlabel
from pipeline.cli import main
from pipeline.config import PredictConfig
from pipeline.errors import MisuseError, ModelError, SourceError
from pipeline.evaluation.run import evaluate
from pipeline.models import predict
from pipeline.models.detect import detect_task
from pipeline.models.predict import _by_name, run
from pipeline.training.run import run as train
from tests.conftest import tiny_model
from tests.support.once import once
from tests.training.test_train import NAMES, config, student_of


@pytest.fixture
def teacher(bert_tokenizer, save_teacher):
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3, spread=4.0)
    model.config.id2label, model.config.label2id = NAMES, {name: i for i, name in NAMES.items()}
    return save_teacher(model, bert_tokenizer)


@pytest.fixture
def trained(tmp_path, teacher, topics):
    """A cache with rows of at most 8 tokens, and the student trained on it."""

    def make(folder: Path) -> None:
        cache = softlabel.cache_logits(
            str(teacher), topics, folder / "cache", task="sequence-classification", max_length=8
        )
        start = student_of(teacher, folder / "init")
        train(config(cache, start, folder / "student", max_steps=40, learning_rate=1e-2))

    once(__name__, make, tmp_path)
    return softlabel.Cache.open(tmp_path / "cache"), tmp_path / "student"


@pytest.fixture
def language_model(lm_tokenizer, save_teacher):
    return save_teacher(tiny_model("llama", len(lm_tokenizer), spread=4.0), lm_tokenizer, "lm")


def test_a_classifier_says_what_transformers_and_the_evaluation_say(trained, topics):
    cache, student = trained
    rows = topics["test"]
    found = list(run(PredictConfig(model=str(student), text=tuple(rows["text"]), top=9)))
    theirs = pipeline("text-classification", model=str(student))(
        list(rows["text"]), truncation=True, max_length=8, top_k=None
    )
    for ours, other in zip(found, theirs, strict=True):
        assert list(ours.labels) == [entry["label"] for entry in other]  # names, the most likely first
        assert list(ours.labels.values()) == pytest.approx([entry["score"] for entry in other], abs=1e-5)
    right = np.mean([next(iter(f.labels)) == label for f, label in zip(found, rows["label"], strict=True)])
    line = evaluate(cache, {"s": student}).students[0]
    assert right == line.metrics["accuracy"]
    nll = [-np.log(f.labels[label]) for f, label in zip(found, rows["label"], strict=True)]
    assert np.mean(nll) == pytest.approx(line.metrics["loss"], abs=1e-5)


def test_longer_texts_are_cut_as_in_training_unless_said_otherwise(trained):
    _, student = trained
    long = "goal match team goal match team " + "market profit bank " * 12
    short = " ".join(long.split()[:6])
    said = {
        length: next(iter(run(PredictConfig(model=str(student), text=(long,), max_length=length))))
        for length in (None, 8, 60)
    }
    alone = next(iter(run(PredictConfig(model=str(student), text=(short,)))))
    assert dict(said[None].labels) == pytest.approx(dict(alone.labels))
    assert said[8] == said[None]
    assert said[60].labels != said[8].labels


def test_a_language_model_goes_on_as_generate_does(language_model):
    found = next(iter(run(PredictConfig(model=str(language_model), text=("the cat",), max_new_tokens=7))))
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    model = AutoModelForCausalLM.from_pretrained(language_model)
    inputs = tokenizer("the cat", return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=7, do_sample=False)
    assert found.continuation == tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found.labels == {}
    with pytest.raises(MisuseError, match="at most 128 tokens"):
        list(run(PredictConfig(model=str(language_model), text=("the cat",), max_new_tokens=127)))


def test_adapters_are_known_by_what_they_say(tmp_path, trained, language_model, documents, teacher):
    cache, _ = trained
    train(config(cache, teacher, tmp_path / "adapter", lora_r=2))
    assert detect_task(str(tmp_path / "adapter")).name == "sequence-classification"
    assert set(next(iter(run(PredictConfig(model=str(tmp_path / "adapter"), text=("a",))))).labels) == set(
        NAMES.values()
    )
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**said, "task_type": "FEATURE_EXTRACTION"}))
    with pytest.raises(ModelError, match="an adapter of the type 'FEATURE_EXTRACTION'"):
        detect_task(str(tmp_path / "adapter"))
    assert detect_task(str(language_model)).name == "causal-lm"


def test_the_command_prints_lines_or_json(trained, tmp_path, monkeypatch):
    _, student = trained
    done = CliRunner().invoke(main, ["predict", "--model", str(student), "--text", "the cat", "--top", "2"])
    first, *labels = done.stdout.splitlines()
    assert first == "'the cat'"
    assert len(labels) == 2
    assert all(line.split()[0] in NAMES.values() and line.endswith("%") for line in labels)
    (tmp_path / "texts").write_bytes("\ufeffthe cat\r\nune étoile\n".encode())
    done = CliRunner().invoke(main, ["predict", "--model", str(student), "--input", str(tmp_path / "texts"), "--json"])
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["text"] for line in lines] == ["the cat", "une étoile"]
    assert sum(lines[0]["labels"].values()) == pytest.approx(1)
    assert set(lines[0]) == {"text", "labels"}
    done = CliRunner().invoke(main, ["predict", "--model", str(student), "--json"], input="the cat\n")
    alone = json.loads(done.stdout)  # in its own batch: the last bits may differ
    assert alone["text"] == "the cat"
    assert alone["labels"] == pytest.approx(lines[0]["labels"], rel=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "texts: expected a text a line, found nothing"),
        (b"one\n \nthree\n", "texts: line 2: expected a text, found an empty one"),
        (b"one\ntw\xffo\n", "texts: line 2: expected UTF-8, found the byte 0xff"),
        (None, "texts: cannot be read"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path, content, message):
    if content is not None:
        (tmp_path / "texts").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        list(run(PredictConfig(model="unused", input=str(tmp_path / "texts"))))


def test_other_mistakes(tmp_path, bert_tokenizer, save_teacher, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a directory without runs/
    with pytest.raises(ModelError, match="no such directory"):
        list(run(PredictConfig(model="./nowhere", text=("a",))))
    with pytest.raises(ModelError, match="there is no such directory here either"):
        list(run(PredictConfig(model="runs/nowhere", text=("a",))))
    headless = save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=3).bert, bert_tokenizer, "headless")
    with pytest.raises(ModelError, match="found the architecture 'BertModel'"):
        list(run(PredictConfig(model=str(headless), text=("a",))))
    with pytest.raises(SourceError, match="--text 2: expected a text, found an empty one"):
        list(run(PredictConfig(model=str(headless), text=("a", ""))))
    with pytest.raises(MisuseError, match="give one of the two"):
        PredictConfig(model="m", text=("a",), input="file")
    with pytest.raises(MisuseError, match=r"--input texts\.csv: is a table; expected a file with one text per line"):
        list(run(PredictConfig(model=str(headless), input="texts.csv")))
    terminal = SimpleNamespace(isatty=lambda: True, buffer=io.BytesIO())
    monkeypatch.setattr(predict.sys, "stdin", terminal)
    with pytest.raises(MisuseError, match="missing a text"):
        list(run(PredictConfig(model=str(headless))))


def test_one_score_is_no_distribution(bert_tokenizer, save_teacher):
    path = save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=1), bert_tokenizer, "regression")
    with pytest.raises(ModelError, match="at least 2 exclusive labels"):
        list(run(PredictConfig(model=str(path), text=("a",))))
    assert torch.is_grad_enabled()


def test_tokens_that_differ_in_spaces_are_shown_once():
    class Spaced:
        def decode(self, ids: list[int]) -> str:
            return [" the", "the", "a", " a", "an"][ids[0]]

    assert _by_name(Spaced(), ([0, 1, 2, 3, 4], [0.5, 0.2, 0.1, 0.05, 0.01]), 2) == {"the": 0.5, "a": 0.1}
