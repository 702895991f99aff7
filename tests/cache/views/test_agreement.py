"""Counts of agreement between teacher and labels, compared with loops over plain lists."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pipeline.cache.views.agreement import agreement, balance, confusion
from pipeline.records import NO_LABEL


def arrays(classes: int, count: int = 500, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, one fifth of them unknown, and mostly correct predictions.

    The last class never occurs as a label.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes - 1, count)
    predicted = np.where(rng.random(count) < 0.7, labels, rng.integers(0, classes, count))
    return np.where(rng.random(count) < 0.2, NO_LABEL, labels), predicted


def name(i: int) -> str:
    return f"class {i}"


@pytest.mark.parametrize("classes", [2, 5, 30, 31, 200])
def test_counts_of_classes(classes):
    labels, predicted = arrays(classes)
    found = balance(labels, predicted, classes, name, most=30)
    known = [i for i in labels.tolist() if i != NO_LABEL]
    of_labels, of_teacher = Counter(known), Counter(predicted.tolist())
    for each in found.classes:
        i = int(each.name.split()[1])
        assert (each.labels, each.teacher) == (of_labels[i], of_teacher[i])
    assert (found.labelled, found.positions, found.num_classes) == (len(known), 500, classes)
    assert found.never_labels == classes - len(of_labels)
    assert found.never_teacher == classes - len(of_teacher)
    assert len(found.classes) == min(classes, 30)
    if classes <= 30:
        assert found.others is None
        assert [each.name for each in found.classes] == [name(i) for i in range(classes)]
    else:
        assert found.others.name == f"{classes - 30} other classes"
        assert found.others.labels + sum(each.labels for each in found.classes) == len(known)
        assert found.others.teacher + sum(each.teacher for each in found.classes) == 500
        assert found.classes[0].labels == max(of_labels.values())
    assert found.most == max(max(each.labels, each.teacher) for each in found.classes)


@pytest.mark.parametrize("classes", [2, 5, 30, 31, 200])
def test_the_confusion_counts_each_labelled_row_once(classes):
    labels, predicted = arrays(classes)
    names = [name(i) for i in range(classes)]
    found = confusion(labels, predicted, names, most=30)
    pairs = Counter((a, b) for a, b in zip(labels.tolist(), predicted.tolist(), strict=True) if a != NO_LABEL)
    assert sum(found.totals) == sum(pairs.values())
    shown = [int(each.split()[1]) for each in found.names if each.startswith("class")]
    for i, line in zip(shown, found.counts, strict=False):
        assert line[: len(shown)] == tuple(pairs[i, j] for j in shown)
        assert sum(line) == sum(count for (a, _), count in pairs.items() if a == i)
    assert found.left_out == max(0, classes - 30)
    assert len(found.names) == len(found.counts) == min(classes, 30) + (classes > 30)
    assert found.numbered == (classes > 12)
    if found.left_out:
        errors = Counter(i for (a, b), count in pairs.items() if a != b for i in (a, b) for _ in range(count))
        assert min(errors[i] for i in shown) >= max(errors[i] for i in range(classes) if i not in shown)


def test_long_names_number_the_columns():
    labels = np.asarray([0, 1])
    assert confusion(labels, labels, ["a", "b" * 17]).numbered
    assert not confusion(labels, labels, ["a", "b" * 16]).numbered


@pytest.mark.parametrize("classes", [2, 5, 200])
def test_agreement_and_the_most_frequent_disagreements(classes):
    labels, predicted = arrays(classes)
    found = agreement(labels, predicted, name)
    rows = [(a, b) for a, b in zip(labels.tolist(), predicted.tolist(), strict=True) if a != NO_LABEL]
    assert (found.labelled, found.unlabelled) == (len(rows), 500 - len(rows))
    assert found.agreed == sum(a == b for a, b in rows)
    assert found.accuracy == found.agreed / len(rows)
    of_label, wrong = Counter(a for a, _ in rows), Counter(pair for pair in rows if pair[0] != pair[1])
    assert found.most_frequent_count == max(of_label.values())
    assert of_label[int(found.most_frequent.split()[1])] == found.most_frequent_count
    assert [pair.count for pair in found.pairs] == [count for _, count in wrong.most_common(10)]
    for pair in found.pairs:
        a, b = (int(each.split()[1]) for each in (pair.label, pair.predicted))
        assert (pair.count, pair.of_label) == (wrong[a, b], of_label[a])
    assert found.other_pairs == max(0, len(wrong) - 10)
    assert found.other_rows + sum(pair.count for pair in found.pairs) == sum(wrong.values())


def test_nothing_labelled_and_nothing_at_all():
    predicted = np.asarray([0, 1, 1])
    unknown = np.full(3, NO_LABEL)
    found = agreement(unknown, predicted, name)
    assert (found.labelled, found.unlabelled, found.agreed, found.most_frequent, found.pairs) == (0, 3, 0, None, ())
    assert confusion(unknown, predicted, ["a", "b"]) is None
    counted = balance(unknown, predicted, 2, name)
    assert [(each.labels, each.teacher) for each in counted.classes] == [(0, 1), (0, 2)]
    none = np.zeros(0, dtype=np.int64)
    assert agreement(none, none, name).labelled == 0
    assert balance(none, none, 2, name).most == 0


def test_one_class_alone_is_present():
    labels = np.zeros(7, dtype=np.int64)
    found = agreement(labels, labels, name)
    assert (found.agreed, found.pairs, found.most_frequent_count) == (7, (), 7)
    assert confusion(labels, labels, ["a", "b"]).counts == ((7, 0), (0, 0))
