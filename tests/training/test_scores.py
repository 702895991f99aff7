"""Scores from end to end: data, teacher, cache, student, evaluation; and the rankings that they make."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForSequenceClassification

import pipeline as softlabel
from pipeline.cache import Cache, verify
from pipeline.config import DataConfig, TrainTeacherConfig
from pipeline.evaluation import evaluate
from pipeline.models.detect import detect_task
from pipeline.records import Columns, Score
from pipeline.training.teacher import run as train_teacher
from tests.conftest import TOPICS, WORDS
from tests.support.once import once
from tests.support.teaching import pretrained, train, write

TASK = "sequence-regression"
NAMES = ("label_0", "label_1")
SMALL = {"num_hidden_layers": 1, "initializer_range": 0.1}
LONG = {"max_steps": 250, "learning_rate": 3e-3}


def rows(seed: int, count: int) -> dict[str, list[Any]]:
    """Texts with two scores of very different units, each a matter of which words there are."""
    rng = random.Random(seed)
    found: dict[str, list[Any]] = {"text": [], "label": []}
    for _ in range(count):
        topics = [name for name in TOPICS if rng.random() < 0.5]
        words = [TOPICS[name][0] for name in topics] + [rng.choice(WORDS[:6]) for _ in range(2)]
        rng.shuffle(words)
        weights = {name: float(i) for i, name in enumerate(TOPICS)}
        found["text"].append(" ".join(words))
        found["label"].append([100.0 + 50.0 * sum(weights[name] for name in topics), 0.01 * len(topics)])
    return found


def texts() -> DatasetDict:
    train, test = rows(0, 240), rows(1, 60)
    train["label"] = [None if i % 8 == 7 else scores for i, scores in enumerate(train["label"])]
    return DatasetDict({"train": Dataset.from_dict(train), "test": Dataset.from_dict(test)})


@pytest.fixture
def teacher(tmp_path, bert_tokenizer) -> Path:
    """Its scores are close to those of the data: written into the bias of its head, since 100 is far from where it begins."""

    def make(folder: Path) -> None:
        base = pretrained(folder / "base", bert_tokenizer, **SMALL)
        data = DataConfig(dataset=str(write(folder / "data", texts())))
        metrics = train_teacher(
            TrainTeacherConfig(
                task=TASK, data=data, model=str(base), output=str(folder / "teacher"), epochs=20, batch_size=8, learning_rate=2e-3
            )
        )  # fmt: skip
        assert metrics["pearson"] > 0.9

    once((__name__, "teacher"), make, tmp_path)
    return tmp_path / "teacher"


@pytest.fixture
def cache(tmp_path, teacher) -> Cache:
    def make(folder: Path) -> None:
        softlabel.cache_logits(str(teacher), texts(), folder / "cache", task=TASK, rows_per_shard=70, batch_tokens=256)

    once((__name__, "cache"), make, tmp_path)
    return Cache.open(tmp_path / "cache")


def test_cached_values_are_the_models(cache, teacher):
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    assert model.config.problem_type == "regression"
    assert detect_task(str(teacher)).name == TASK
    contract = cache.manifest.contract
    assert (contract.num_classes, contract.label_names, contract.encoding) == (1, NAMES, Score())
    assert not verify(cache.root).problems
    source = texts()["train"]
    for row in cache.dataset("train"):
        known = source[row.example.source_row]["label"]
        expected = np.array([math.nan] * 2 if known is None else known, dtype=np.float32)
        np.testing.assert_array_equal(row.example.labels, expected)
        with torch.no_grad():
            scores = model(input_ids=torch.from_numpy(row.example.input_ids.astype(np.int64))[None]).logits[0]
        torch.testing.assert_close(row.soft.top_logprobs, scores, atol=1e-4, rtol=1e-4)


def test_a_student_comes_close_to_its_teacher_and_a_control_beside_it(tmp_path, cache, bert_tokenizer):
    start = pretrained(tmp_path / "start", bert_tokenizer, seed=1, **SMALL)
    train(cache, start, tmp_path / "untrained", max_steps=1, learning_rate=1e-9)
    train(cache, start, tmp_path / "student", **LONG)
    train(cache, start, tmp_path / "control", **LONG, hard_weight=1.0, soft_weight=0.0)
    found = evaluate(cache, {name: tmp_path / name for name in ("untrained", "student", "control")})
    before, student, control = found.students
    assert found.main_metric == "pearson"
    assert found.teacher.metrics["pearson"] > 0.9
    assert before.agreement is not None
    assert before.agreement < 0.5
    assert student.agreement is not None
    assert student.agreement > 0.9
    assert control.agreement is not None
    assert control.agreement > 0.7
    assert student.kl is not None
    assert before.kl is not None
    assert student.kl < 0.25 * before.kl


# ------------------------------------------------------------------------------------------------------------ rankings


def queries(seed: int, count: int) -> dict[str, list[Any]]:
    """Lists of 3 to 6 documents, in any order; how relevant one is, 0 to 2, is a matter of its topic's word."""
    rng = random.Random(seed)
    found: dict[str, list[Any]] = {"query": [], "document": [], "label": [], "id": []}
    grades = {name: float(i) for i, name in enumerate(TOPICS)}
    for number in range(count):
        for _ in range(rng.randint(3, 6)):
            topic = rng.choice(list(TOPICS))
            words = [TOPICS[topic][0], *(rng.choice(WORDS[:6]) for _ in range(2))]
            rng.shuffle(words)
            found["query"].append(rng.choice(WORDS[:6]))
            found["document"].append(" ".join(words))
            found["label"].append(grades[topic])
            found["id"].append(f"q{number}")
    return found


RANKING = Columns(text="query", text_pair="document", label="label", group="id")


def lists() -> DatasetDict:
    return DatasetDict({"train": Dataset.from_dict(queries(0, 80)), "test": Dataset.from_dict(queries(1, 30))})


@pytest.fixture
def ranked(tmp_path, bert_tokenizer) -> Cache:
    def make(folder: Path) -> None:
        base = pretrained(folder / "base", bert_tokenizer, **SMALL)
        data = DataConfig(
            dataset=str(write(folder / "lists", lists())),
            text_column="query", text_pair_column="document", group_column="id",
        )  # fmt: skip
        metrics = train_teacher(
            TrainTeacherConfig(
                task="text-ranking", data=data, model=str(base), output=str(folder / "ranker"), epochs=25, batch_size=16, learning_rate=3e-3
            )
        )  # fmt: skip
        assert metrics["ndcg@10"] > 0.9
        softlabel.cache_logits(
            str(folder / "ranker"), lists(), folder / "ranked", task="text-ranking", columns=RANKING, rows_per_shard=50, batch_tokens=256
        )  # fmt: skip

    once((__name__, "ranked"), make, tmp_path)
    return Cache.open(tmp_path / "ranked")


@pytest.mark.parametrize("divergence", ["margin-mse", "listwise-kl", "mse"])
def test_a_student_ranks_as_its_teacher(tmp_path, ranked, bert_tokenizer, divergence):
    start = pretrained(tmp_path / "start", bert_tokenizer, seed=1, **SMALL)
    train(ranked, start, tmp_path / "untrained", max_steps=1, learning_rate=1e-9)
    train(ranked, start, tmp_path / "student", max_steps=120, learning_rate=3e-3, divergence=divergence)
    found = evaluate(ranked, {name: tmp_path / name for name in ("untrained", "student")})
    before, student = found.students
    assert found.main_metric == "ndcg@10"
    assert found.teacher.metrics["ndcg@10"] > 0.95
    assert before.metrics["ndcg@10"] < 0.9
    assert student.metrics["ndcg@10"] > 0.95
    assert student.retention_interval is not None
    from pipeline.evaluation.table import format_table

    print(format_table(found))
