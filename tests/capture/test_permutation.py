"""The check that the data numbers its classes in the teacher's order.

A capture is refused only if another order fits significantly better.
"""

from __future__ import annotations

import math
from typing import Any

import datasets
import numpy as np
import pytest

import pipeline as softlabel
from pipeline.cache.transforms.merge import merge
from pipeline.cache.views.inspection import labelled
from pipeline.capture import job
from pipeline.capture.permutation import _Row, _sample, better_order
from pipeline.cli.echo import echo_cache
from pipeline.errors import ContractError, SourceError
from pipeline.records import Columns
from tests.support.classifier import even, swapped

# --------------------------------------------------------------------------- the test as statistics


def pilot(truth: np.ndarray, predicted: np.ndarray, classes: int, size: int = 512) -> dict[int, int]:
    rows = [_Row("train", i, int(label), "") for i, label in enumerate(truth)]
    chosen = [row.number for row in _sample(rows, size)]
    return better_order(truth[chosen], predicted[chosen], classes)


def drawn(generator: np.random.Generator, classes: int, rows: int, accuracy: float, skew: float = 3.0) -> Any:
    """Unbalanced true classes, and the predictions of a teacher with the given accuracy."""
    truth = generator.choice(classes, rows, p=generator.dirichlet(np.full(classes, skew)))
    right = generator.random(rows) < accuracy
    return truth, np.where(right, truth, generator.integers(classes, size=rows))


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("rows", [30, 200, 2000])
def test_bad_teachers_and_noisy_labels_are_hardly_ever_refused(classes, rows):
    generator = np.random.default_rng(classes * rows)
    refused, runs = 0, 0
    for _ in range(8 if rows == 2000 else 20):
        truth, _ = drawn(generator, classes, rows, 0.5)
        weights = generator.dirichlet(np.ones(classes))
        noise = generator.integers(classes, size=rows)
        for labels, predicted in (
            (truth, np.full(rows, generator.integers(classes))),  # always one class
            (truth, generator.choice(classes, rows, p=weights)),  # independent of the labels
            (truth, np.where(generator.random(rows) < 0.97, generator.integers(classes), noise)),  # almost one class
            drawn(generator, classes, rows, 0.2),
            (np.where(generator.random(rows) < 0.8, noise, truth), drawn(generator, classes, rows, 0.9)[1]),
            (np.where(generator.random(rows) < 0.6, noise, truth), truth),  # perfect teacher, noisy labels
            (truth, np.where(truth == 0, 1, truth)),  # one class is never predicted
        ):
            refused += bool(pilot(labels, predicted, classes))
            runs += 1
    assert refused / runs < 0.01, (refused, runs)


@pytest.mark.parametrize("classes", [2, 3, 10, 50])
@pytest.mark.parametrize(("rows", "accuracy"), [(400, 0.95), (3000, 0.85)])
def test_swapped_and_rotated_classes_are_found(classes, rows, accuracy):
    generator = np.random.default_rng(classes + rows)
    found, runs = 0, 0
    for moved in {2, classes}:
        for _ in range(20):
            truth, predicted = drawn(generator, classes, rows, accuracy)
            order = np.arange(classes)
            cycle = generator.choice(classes, moved, replace=False)
            order[cycle] = np.roll(order[cycle], 1)  # class c is numbered order[c]
            back = pilot(order[truth], predicted, classes)
            expected = {int(label): int(c) for c, label in enumerate(order) if c != label}
            assert set(back.items()) <= set(expected.items())
            found += bool(back)
            runs += 1
    assert found / runs >= (0.95 if classes <= 10 else 0.5), (found, runs)


def test_few_rows_say_nothing():
    for rows in (0, 1, 2, 8):
        truth = np.arange(rows) % 2
        assert better_order(truth, 1 - truth, 2) == {}
    truth = np.arange(64) % 2
    assert better_order(truth, 1 - truth, 2) == {0: 1, 1: 0}
    assert better_order(truth, truth, 2) == {}


def test_classes_counted_from_1_in_place_of_0():
    truth = np.arange(300) % 3
    assert better_order(truth + 1, truth, 4) == {1: 0, 2: 1, 3: 2}


def test_a_rare_class_is_looked_at_as_often_as_others():
    rows = [_Row("train", i, 0 if i % 100 else 1, "") for i in range(5000)]
    assert sum(row.label for row in _sample(rows, 128)) == 50
    assert [row.number for row in _sample(rows, 4)] == [0, 1, 2, 100]


# --------------------------------------------------------------------------------- during a capture


@pytest.fixture(scope="module")
def predicted(bert_tokenizer):
    """A teacher, texts, and the classes that it predicts for them."""
    return even(bert_tokenizer)


def data(texts, labels):
    return datasets.Dataset.from_dict({"text": texts, "label": labels})


def cached(teacher, tokenizer, dataset, output, **settings):
    return softlabel.cache_logits(
        teacher, dataset, output, task="sequence-classification", tokenizer=tokenizer, **settings
    )


def test_another_order_is_refused_with_the_map_that_mends_it(tmp_path, bert_tokenizer, predicted):
    teacher, texts, classes = predicted
    other = data(texts, swapped(classes))
    with pytest.raises(SourceError) as refused:
        cached(teacher, bert_tokenizer, other, tmp_path / "cache")
    message = str(refused.value)
    assert "it predicts the label of 0%, and of 100% where '0' is 'film', not 'sport', '1' is 'sport'" in message
    assert "add --label-map 0=film --label-map 1=sport (or, if the labels are right as they are" in message
    assert "\n" not in message
    assert not (tmp_path / "cache").exists() or not any((tmp_path / "cache").rglob("*.json"))
    mended = cached(teacher, bert_tokenizer, other, tmp_path / "cache", label_map={0: "film", 1: "sport"})
    assert [row.example.label for row in mended.dataset("train")] == classes
    assert mended.manifest.contract.source.label_map == ("0=film", "1=sport")
    with pytest.raises(ContractError, match="label_map"):
        cached(teacher, bert_tokenizer, other, tmp_path / "cache")
    as_it_is = cached(teacher, bert_tokenizer, other, tmp_path / "other", label_map={0: "sport"})
    assert [row.example.label for row in as_it_is.dataset("train")] == other["label"]


def test_the_right_order_is_cached_and_a_resumed_capture_does_not_look_again(
    tmp_path, bert_tokenizer, predicted, monkeypatch
):
    teacher, texts, classes = predicted
    cached(teacher, bert_tokenizer, data(texts, classes), tmp_path / "cache")
    names = datasets.ClassLabel(names=["Film ", "SPORT", "business"])
    by_name = data(texts, swapped(classes)).cast_column("label", names)
    found = cached(teacher, bert_tokenizer, by_name, tmp_path / "names")
    assert [row.example.label for row in found.dataset("train")] == classes
    monkeypatch.setattr(job, "check_class_order", lambda *_, **__: pytest.fail("looked again"))
    cached(teacher, bert_tokenizer, data(texts, classes), tmp_path / "cache")


def test_appended_rows_in_another_order_are_refused_and_the_cache_stands(
    tmp_path, bert_tokenizer, predicted, monkeypatch
):
    """Half of all rows are old and right, so that a check over all rows would pass."""
    teacher, texts, classes = predicted
    first, root = data(texts[:80], classes[:80]), tmp_path / "cache"
    cached(teacher, bert_tokenizer, first, root)
    files = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    mixed = data(texts, classes[:80] + swapped(classes[80:]))
    with pytest.raises(SourceError, match=r"--append: the classes of the new rows \(from row 80 on\)") as refused:
        cached(teacher, bert_tokenizer, mixed, root, append=True)
    message = str(refused.value)
    assert "'0' is 'film', not 'sport', '1' is 'sport', not 'film'" in message
    assert "--rows 80: and --label-map 0=film --label-map 1=sport, into another --output" in message
    assert "\n" not in message
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == files

    mended = cached(
        teacher, bert_tokenizer, mixed, tmp_path / "new", rows=(80, None), label_map={0: "film", 1: "sport"}
    )
    both = merge([root, mended], tmp_path / "both")
    assert [row.example.label for row in both.dataset("train")] == classes

    grown = cached(teacher, bert_tokenizer, data(texts, classes), root, append=True)
    assert [row.example.label for row in grown.dataset("train")] == classes
    monkeypatch.setattr(job, "check_class_order", lambda *_, **__: pytest.fail("looked again"))
    assert cached(teacher, bert_tokenizer, data(texts, classes), root, append=True).manifest == grown.manifest


def test_labelled_rows_are_counted_by_split(tmp_path, bert_tokenizer, predicted, capsys):
    teacher, texts, classes = predicted
    some = [label if i % 4 else None for i, label in enumerate(classes)]
    both = datasets.DatasetDict({"train": data(texts, some), "test": datasets.Dataset.from_dict({"text": texts[:5]})})
    cache = cached(teacher, bert_tokenizer, both, tmp_path / "cache")
    assert labelled(cache) == {"train": 120, "test": 0}
    echo_cache(cache, str(tmp_path / "cache"))
    shown = capsys.readouterr().out
    assert "train: 160 rows, 120 labelled, " in shown
    assert "test: 5 rows, 0 labelled, " in shown


def test_labels_that_are_not_found_are_told(tmp_path, bert_tokenizer, predicted, caplog):
    teacher, texts, classes = predicted
    other = datasets.Dataset.from_dict({"text": texts, "topic": classes})
    cached(teacher, bert_tokenizer, other, tmp_path / "named", columns=Columns(label="topics"))
    assert "no split has the label column 'topics'; found text, topic" in caplog.text
    cached(teacher, bert_tokenizer, other, tmp_path / "cache", columns=Columns())
    assert (
        "no label column, found text, topic: the cache will have no hard labels for the teacher's classes"
        in caplog.text
    )
    assert "--label-column" in caplog.text


def test_a_sign_test_is_exact():
    from pipeline.capture.permutation import _sign_test

    assert _sign_test(0, 0) == 1
    assert _sign_test(10, 0) == 2**-10
    assert math.isclose(_sign_test(3, 1), 5 / 16)
