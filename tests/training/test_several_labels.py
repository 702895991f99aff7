"""Multi-label classification end to end: a teacher, its cache, students, and refused inputs."""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForSequenceClassification

import pipeline as softlabel
from pipeline.cache import Cache, verify
from pipeline.cache.format.sanity import contract_problem
from pipeline.cache.transforms.convert import convert
from pipeline.cache.transforms.merge import merge
from pipeline.cache.views.samples import share_of_yes
from pipeline.capture.labelled import LabelledRow
from pipeline.capture.write import write_cache
from pipeline.config import DataConfig, TrainTeacherConfig
from pipeline.errors import BadRowError, ContractError, MisuseError, ModelError, SourceError
from pipeline.evaluation import evaluate
from pipeline.models.detect import detect_task
from pipeline.records import NO_LABEL, Columns, Full, Sampled
from pipeline.training.teacher import run as train_teacher
from tests.conftest import TOPICS, WORDS
from tests.support.once import once
from tests.support.teaching import pretrained, train, write

TASK = "multi-label-classification"
NAMES = ("business", "film", "sport")
#: Shape of a model that learns to detect words within a few hundred steps.
SMALL = {"num_hidden_layers": 1, "initializer_range": 0.1}
LONG = {"max_steps": 200, "learning_rate": 3e-3}


def rows(seed: int, count: int) -> dict[str, list[Any]]:
    """Return texts on none to all of three topics, as shown by their words."""
    rng = random.Random(seed)
    found: dict[str, list[Any]] = {"text": [], "label": []}
    for _ in range(count):
        names = [name for name in TOPICS if rng.random() < 0.4]
        words = [TOPICS[name][0] for name in names] + [rng.choice(WORDS[:6]) for _ in range(2)]
        rng.shuffle(words)
        found["text"].append(" ".join(words))
        found["label"].append(names)
    return found


def texts() -> DatasetDict:
    train, test = rows(0, 240), rows(1, 60)
    train["label"] = [None if i % 8 == 7 else names for i, names in enumerate(train["label"])]
    return DatasetDict({"train": Dataset.from_dict(train), "test": Dataset.from_dict(test)})


@pytest.fixture
def teacher(tmp_path, bert_tokenizer) -> Path:
    def make(folder: Path) -> None:
        base = pretrained(folder / "base", bert_tokenizer, **SMALL)
        data = DataConfig(dataset=str(write(folder / "data", texts())))
        metrics = train_teacher(
            TrainTeacherConfig(
                task=TASK, data=data, model=str(base), output=str(folder / "teacher"), epochs=15, batch_size=8, learning_rate=2e-3
            )
        )  # fmt: skip
        assert metrics["f1"] > 0.85

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
    assert model.config.problem_type == "multi_label_classification"
    assert detect_task(str(teacher)).name == TASK
    contract = cache.manifest.contract
    assert (contract.num_classes, contract.label_names) == (2, NAMES)
    assert not verify(cache.root).problems
    source = texts()["train"]
    for row in cache.dataset("train"):
        names = source[row.example.source_row]["label"]
        expected = [NO_LABEL] * 3 if names is None else [int(name in names) for name in NAMES]
        assert row.example.labels.tolist() == expected
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(row.example.input_ids.astype(np.int64))[None]).logits[0]
        found = row.soft.top_logprobs.view(3, 2)
        torch.testing.assert_close(found[:, 1], torch.nn.functional.logsigmoid(logits), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[:, 0], torch.nn.functional.logsigmoid(-logits), atol=1e-4, rtol=1e-4)


def test_the_loss_is_the_binary_one_of_each_label(cache, teacher):
    """Compares value and gradient with plain PyTorch in float64.

    The loss is 0.1 BCE + 0.9 T^2 KL of two Bernoulli distributions, averaged over labels.
    """
    from pipeline.records import Loss
    from pipeline.tasks import get_task
    from pipeline.training.batches.collate import Collator, Picked
    from pipeline.training.losses import distillation_loss

    task, temperature = get_task(TASK), 2.0
    batch = Collator(task, cache.tokenizer, temperature).collate(
        Picked((cache.dataset("train").segments(np.arange(12)),), np.ones(12, dtype=bool))
    )
    z = torch.randn(36, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    terms = distillation_loss(
        torch.stack([torch.zeros_like(z), z], -1),
        batch.target,
        labels=batch.labels,
        loss=Loss(0.1, 0.9, temperature=temperature),
        temperature=temperature,
    )
    known = batch.labels != NO_LABEL
    hard = torch.nn.functional.binary_cross_entropy_with_logits(z[known], batch.labels[known].double())
    q = batch.target.weights.double().view(36, 2)[:, 1]
    p = torch.sigmoid(z / temperature)
    kl = q * (q.log() - p.log()) + (1 - q) * ((1 - q).log() - (1 - p).log())
    expected = 0.1 * hard + 0.9 * temperature**2 * kl.mean()
    torch.testing.assert_close(terms.total, expected, atol=1e-6, rtol=1e-6)
    ours, theirs = (torch.autograd.grad(value, z, retain_graph=True)[0] for value in (terms.total, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.full
def test_a_student_comes_close_to_its_teacher_and_a_control_beside_it(tmp_path, cache, bert_tokenizer):
    start = pretrained(tmp_path / "start", bert_tokenizer, seed=1, **SMALL)
    train(cache, start, tmp_path / "untrained", max_steps=1, learning_rate=1e-9)
    train(cache, start, tmp_path / "student", **LONG)
    train(cache, start, tmp_path / "control", **LONG, hard_weight=1.0, soft_weight=0.0)
    found = evaluate(cache, {name: tmp_path / name for name in ("untrained", "student", "control")})
    before, student, control = found.students
    assert found.main_metric == "f1"
    assert before.agreement < 0.75
    assert student.agreement > 0.88
    assert control.metrics["f1"] > 0.8
    assert student.kl < before.kl / 3
    assert student.retention_interval.low <= student.retention <= student.retention_interval.high


@pytest.mark.full
def test_a_student_with_another_tokenizer_learns_from_the_texts(tmp_path, cache, lm_tokenizer):
    start = pretrained(tmp_path / "start", lm_tokenizer, seed=1, **SMALL)
    train(cache, start, tmp_path / "student", **LONG)
    assert evaluate(cache, {"student": tmp_path / "student"}).students[0].agreement > 0.85


@pytest.mark.parametrize("kind", ["flags", "booleans", "numbers"])
def test_labels_may_be_one_number_a_class(tmp_path, teacher, cache, kind):
    def given(names: list[str] | None) -> Any:
        if names is None:
            return None
        if kind == "numbers":  # for the known labels
            return [NAMES.index(name) for name in names]
        return [(bool if kind == "booleans" else float)(name in names) for name in NAMES]

    data = texts().map(lambda row: {"flags": given(row["label"])}, remove_columns="label")
    found = softlabel.cache_logits(str(teacher), data, tmp_path / "flags", task=TASK, columns=Columns(label="flags"))
    for split in ("train", "test"):
        pairs = zip(found.dataset(split), cache.dataset(split), strict=True)
        assert all(a.content_hash == b.content_hash for a, b in pairs)


def test_caches_are_merged_and_converted(tmp_path, cache):
    texts_of = [row.example.text for row in cache.dataset("test")]
    joined = merge([cache, cache], tmp_path / "joined").dataset("test")
    assert [row.example.text for row in joined] == list(dict.fromkeys(texts_of))
    smaller = convert(cache, tmp_path / "smaller", encoding=Sampled(4.0, temperature=2.0))
    assert not verify(smaller.root).problems
    yes, drawn = (
        np.array([share_of_yes(row) for row in each.dataset("train")]) for each in (cache, smaller)
    )  # (R, 3) at T = 1 and at T = 2
    expected = 1 / (1 + np.sqrt((1 - yes) / yes))
    assert np.abs(drawn - expected).mean() < 0.1
    assert abs((drawn - expected).mean()) < 0.02  # unbiased: each label is drawn independently
    pairs = zip(smaller.dataset("train"), cache.dataset("train"), strict=True)
    assert all(a.example.labels.tolist() == b.example.labels.tolist() for a, b in pairs)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (["business"], SourceError, "expected a list of a row's labels, or a list of one boolean or float per class, found text"),
        ([["business", "business"]], BadRowError, "label: label 'business' twice; expected the labels that the row has, each once"),
        ([["music"]], SourceError, "unknown label 'music'"),
        ([[1.0, 0.0]], BadRowError, "label: expected 3 numbers, one for each class, found 2"),
        ([[1.0, 0.5, 0.0]], BadRowError, "label: expected 0 or 1 for each class, found 0.5"),
        ([[0, 0, 1]], BadRowError, "label 0 twice; .* if the column holds a number for each class, make it booleans or floats"),
    ],
)  # fmt: skip
def test_labels_that_are_refused(tmp_path, teacher, labels, error, message):
    rows = Dataset.from_dict({"text": ["the cat"], "label": labels})
    with pytest.raises(error, match=message):
        softlabel.cache_logits(str(teacher), rows, tmp_path / "bad", task=TASK)
    assert not (tmp_path / "bad" / "manifest.json").exists()


def test_lists_of_labels_are_not_one_label(tmp_path, teacher):
    with pytest.raises(
        ModelError, match=r"found 3 .multi_label_classification.; give --task multi-label-classification"
    ):
        softlabel.cache_logits(str(teacher), texts(), tmp_path / "bad", task="sequence-classification")


def test_another_order_of_labels_is_another_student(tmp_path, cache, teacher):
    model = AutoModelForSequenceClassification.from_pretrained(teacher)
    model.config.id2label = {0: "film", 1: "business", 2: "sport"}
    model.save_pretrained(tmp_path / "other")
    cache.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ContractError, match="label 0: expected 'business', as in the cache, found 'film'"):
        train(cache, tmp_path / "other", tmp_path / "student")


def test_an_adapter_is_refused(tmp_path, cache, bert_tokenizer):
    pytest.importorskip("peft")
    with pytest.raises(
        MisuseError,
        match=r"--lora-r: an adapter_config\.json does not record that the model gives several labels at once",
    ):
        train(cache, pretrained(tmp_path / "start", bert_tokenizer), tmp_path / "student", lora_r=2)


def test_rows_of_which_some_labels_are_not_known(tmp_path, bert_tokenizer, cache, teacher, caplog):
    """Teachers train only on rows with all labels.

    Students train on the known labels of a row.
    """
    data = texts().map(
        lambda row, i: {"flags": None if row["label"] is None else [None if i % 2 else 1.0, 0.0, float(i % 3 == 0)]},
        with_indices=True,
        remove_columns="label",
    )
    folder = write(tmp_path / "partial", data)
    settings = {"task": TASK, "data": DataConfig(dataset=str(folder), label_column="flags", label_map=())}
    base = pretrained(tmp_path / "small", bert_tokenizer, **SMALL)
    train_teacher(TrainTeacherConfig(**settings, model=str(base), output=str(tmp_path / "other"), max_steps=2))
    assert "split train: 90 rows are left out because only some of their labels are known" in caplog.text
    found = softlabel.cache_logits(str(teacher), data, tmp_path / "c", task=TASK, columns=Columns(label="flags"))
    labels = np.concatenate([row.example.labels for row in found.dataset("train")])
    assert (labels == NO_LABEL).sum() == 3 * 30 + 90
    result = train(found, base, tmp_path / "student", max_steps=3)
    assert np.isfinite(result.hard_loss)


def test_rows_of_ones_own(tmp_path, bert_tokenizer):
    def rows(labels: Any) -> list[LabelledRow]:
        logits = np.array([[0.0, 2.0], [0.0, -1.0], [0.0, 0.5]], dtype=np.float32)
        return [LabelledRow([2, 5, 3], logits, text="a", labels=labels)]

    settings = {"task": TASK, "tokenizer": bert_tokenizer, "encoding": Full(), "teacher": "t"}
    cache = write_cache(rows([1, 0, NO_LABEL]), tmp_path / "a", label_names=NAMES, **settings)
    assert not verify(cache.root).problems
    (row,) = cache.dataset("train")
    assert row.example.labels.tolist() == [1, 0, NO_LABEL]
    yes = row.soft.top_logprobs.view(3, 2)[:, 1]
    torch.testing.assert_close(
        yes, torch.nn.functional.logsigmoid(torch.tensor([2.0, -1.0, 0.5])), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(BadRowError, match="row 0: labels: expected 3, one a"):
        write_cache(rows([1, 0]), tmp_path / "b", label_names=NAMES, **settings)
    with pytest.raises(MisuseError, match=r"give label_names=...: rows have one position per name"):
        write_cache(rows([1, 0, 0]), tmp_path / "c", **settings)


def test_the_card_of_a_student_says_what_f1_is(tmp_path, cache, bert_tokenizer):
    start = pretrained(tmp_path / "start", bert_tokenizer, **SMALL)
    train(cache, start, tmp_path / "student", max_steps=2, eval_split="test", training={"eval_strategy": "epoch"})
    card = (tmp_path / "student" / "README.md").read_text()
    assert "`f1` is of all labels together (micro)" in card
    assert "of entities" not in card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 3}, "num_classes: expected 2 for each of several labels, found 3"),
        ({"label_names": ()}, "label_names: expected 1 to .*, found 0"),
        ({"label_names": None}, "label_names: expected 1 to .*, found None"),
    ],
)
def test_contracts_that_no_capture_writes(cache, change, message):
    assert re.search(message, str(contract_problem(dataclasses.replace(cache.manifest.contract, **change))))
