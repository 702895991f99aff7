"""The evaluation table, compared with other libraries, for copies and random students."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

import pipeline as softlabel
from pipeline.cache.format.manifest import dump, parse
from pipeline.config import EvaluateConfig
from pipeline.errors import MisuseError
from pipeline.evaluation import format_table
from pipeline.evaluation.run import run
from pipeline.records import EvaluationReport, Full, Sampled, TopK
from tests.conftest import tiny_model
from tests.support.once import once


@pytest.fixture
def classifier(bert_tokenizer, save_teacher):
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3, spread=4.0)
    model.config.id2label = {0: "business", 1: "sport", 2: "film"}
    model.config.label2id = {"business": 0, "sport": 1, "film": 2}
    return save_teacher(model, bert_tokenizer)


@pytest.fixture
def cache(tmp_path, classifier, topics):
    def make(folder: Path) -> None:
        softlabel.cache_logits(str(classifier), topics, folder / "cache", task="sequence-classification")

    once(__name__, make, tmp_path)
    return softlabel.Cache.open(tmp_path / "cache")


def test_the_teacher_as_its_own_student(cache, classifier):
    report = softlabel.evaluate(cache, {"copy": classifier})
    copy = report.students[0]
    assert copy.agreement == 1
    assert copy.kl == pytest.approx(0, abs=1e-6)
    assert copy.retention == 1
    assert (copy.retention_interval.low, copy.retention_interval.high) == (1, 1)
    assert copy.size_ratio == 1
    for name, value in report.teacher.metrics.items():
        assert copy.metrics[name] == pytest.approx(value, abs=1e-6), name


def test_metrics_are_those_of_other_libraries(cache, classifier, bert_tokenizer):
    student = tiny_model("bert", len(bert_tokenizer), num_labels=3, seed=5, spread=4.0)
    report = softlabel.evaluate(cache, {"s": student})
    labels, ours, theirs, kl, nll = [], [], [], [], []
    for row in cache.dataset("test"):
        with torch.inference_mode():
            logits = student(input_ids=torch.from_numpy(row.example.input_ids.astype(np.int64))[None]).logits[0]
        p, q = torch.log_softmax(logits, -1), torch.log_softmax(row.soft.top_logprobs, -1)
        labels.append(row.example.label)
        ours.append(int(p.argmax()))
        theirs.append(int(q.argmax()))
        kl.append(float((q.exp() * (q - p)).sum()))
        nll.append(-float(p[row.example.label]))
    line = report.students[0]
    assert line.metrics["accuracy"] == pytest.approx(accuracy_score(labels, ours))
    assert line.metrics["macro_f1"] == pytest.approx(f1_score(labels, ours, average="macro"))
    assert line.metrics["loss"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert line.agreement == pytest.approx(np.mean(np.equal(ours, theirs)))
    assert line.kl == pytest.approx(np.mean(kl), rel=1e-4)
    assert report.teacher.metrics["accuracy"] == pytest.approx(accuracy_score(labels, theirs))
    assert line.retention == pytest.approx(line.metrics["accuracy"] / report.teacher.metrics["accuracy"])
    assert line.retention_interval.low <= line.retention <= line.retention_interval.high


@pytest.mark.parametrize("encoding", [Full(), TopK(8), Sampled(8.0)], ids=lambda e: e.kind)
def test_language_models(tmp_path, lm_tokenizer, documents, save_teacher, encoding):
    teacher = tiny_model("llama", len(lm_tokenizer), spread=4.0)
    path = save_teacher(teacher, lm_tokenizer)
    cache = softlabel.cache_logits(
        str(path), documents, tmp_path / "c", task="causal-lm", max_length=32, encoding=encoding
    )
    student = tiny_model("llama", len(lm_tokenizer), seed=4, spread=4.0)
    report = softlabel.evaluate(cache, {"copy": path, "s": student})
    copy, other = report.students
    assert copy.agreement > 0.99
    assert copy.kl == pytest.approx(0, abs=0.05 if encoding.kind == "sampled" else 2e-3)
    assert copy.metrics["loss"] == pytest.approx(report.teacher.metrics["loss"], rel=1e-3)
    assert copy.retention == pytest.approx(1, rel=1e-3)
    nll, kl, tokens, text_bytes = 0.0, 0.0, 0, 0
    for row in cache.dataset("test"):
        ids = torch.from_numpy(row.example.input_ids.astype(np.int64))
        with torch.inference_mode():
            p = torch.log_softmax(student(input_ids=ids[None]).logits[0, :-1], -1)
            q = torch.log_softmax(teacher(input_ids=ids[None]).logits[0, :-1], -1)
        nll -= float(p.gather(-1, ids[1:, None]).sum())
        kl += float((q.exp() * (q - p)).sum())
        tokens += len(ids) - 1
        text_bytes += row.example.text_bytes
    assert report.positions == tokens
    assert other.metrics["loss"] == pytest.approx(nll / tokens, rel=1e-4)
    assert other.metrics["perplexity"] == pytest.approx(np.exp(nll / tokens), rel=1e-3)
    assert other.metrics["bits_per_byte"] == pytest.approx(nll / np.log(2) / text_bytes, rel=1e-4)
    if encoding.kind == "full":
        assert other.kl == pytest.approx(kl / tokens, rel=1e-3)
    elif encoding.kind == "top-k":  # fewer buckets: a lower bound
        assert 0 < other.kl <= kl / tokens
    else:  # unbiased: within 10% over these positions
        assert other.kl == pytest.approx(kl / tokens, rel=0.1)


def test_the_command_keeps_its_report(tmp_path, cache, classifier):
    config = EvaluateConfig(cache=str(cache.root), student=(f"copy={classifier}",), output=str(tmp_path / "out"))
    report = run(config)
    assert (tmp_path / "out" / "evaluation.json").read_text() == dump(report)
    table = format_table(report)
    assert "copy" in table
    assert "retention" in table


def test_two_students_of_one_name(cache, classifier):
    with pytest.raises(MisuseError, match="NAME=DIR"):
        run(EvaluateConfig(cache=str(cache.root), student=(str(classifier), str(classifier))))


def test_a_split_without_labels(tmp_path, classifier, topics):
    cache = softlabel.cache_logits(
        str(classifier), topics["train"].remove_columns("label"), tmp_path / "c", task="sequence-classification"
    )
    report = softlabel.evaluate(cache, {"s": classifier}, split="train")
    line = report.students[0]
    assert (report.labelled, report.teacher.metrics, line.metrics, line.retention) == (0, {}, {}, None)
    assert (line.agreement, round(line.kl, 5)) == (1, 0)
    table = format_table(report)
    assert "split train: 90 rows, 90 positions, 0 labelled" in table
    assert "no hard labels" in table
    assert "retention" not in table
    (tmp_path / "report.json").write_text(dump(report))
    assert parse(EvaluationReport, tmp_path / "report.json") == report


def test_metrics_name_the_labelled_rows_of_a_split(cache, classifier):
    report = softlabel.evaluate(cache, {"s": classifier}, split="train")  # every fifth row has no label
    assert "split train: 90 rows, 90 positions, 72 labelled" in format_table(report)


def test_continuations_of_every_model(tmp_path, lm_tokenizer, documents, save_teacher, classifier, cache):
    path = save_teacher(tiny_model("llama", len(lm_tokenizer), spread=4.0), lm_tokenizer, "lm")
    lm_cache = softlabel.cache_logits(str(path), documents, tmp_path / "c", task="causal-lm", max_length=32)
    config = EvaluateConfig(
        cache=str(lm_cache.root), student=(f"copy={path}",), prompt=("the cat", "a"), teacher=str(path)
    )
    report = run(config)
    assert [c.prompt for c in report.continuations] == ["the cat", "a"]
    for continuation in report.continuations:
        assert continuation.texts["copy"] == continuation.texts["teacher"]
    assert "'the cat' continues:" in format_table(report)
    with pytest.raises(MisuseError, match="--prompt is for language models"):
        run(EvaluateConfig(cache=str(cache.root), student=(f"copy={classifier}",), prompt=("the",)))


def test_a_student_without_a_trained_head_is_not_measured(tmp_path, cache, bert_tokenizer, save_teacher):
    headless = save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=3).bert, bert_tokenizer, "headless")
    with pytest.raises(softlabel.PipelineError, match="lacks 2 weights"):
        softlabel.evaluate(cache, {"s": headless})
