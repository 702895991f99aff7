"""Compare the teacher's most likely classes with the hard labels: counts, accuracy, confusion.

Pure functions over arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.records import NO_LABEL

#: Number of classes that are shown separately; the rest is combined in one line.
MOST_CLASSES = 30
_MOST_PAIRS = 10


@dataclass(frozen=True, slots=True)
class ClassCount:
    """How often a class is the hard label, and how often the teacher's most likely class."""

    name: str
    labels: int
    teacher: int


@dataclass(frozen=True, slots=True)
class Balance:
    """Counts of labels and predictions by class."""

    classes: tuple[ClassCount, ...]
    """In order of the classes if all are shown, else by descending count."""
    others: ClassCount | None
    """The sum over the classes that are not shown."""
    labelled: int
    positions: int
    """All positions, labelled or not."""
    num_classes: int
    never_labels: int
    """Number of classes that are never a label."""
    never_teacher: int

    @property
    def most(self) -> int:
        """The largest count of a class that is shown, which is the end of the axis."""
        return max((max(each.labels, each.teacher) for each in self.classes), default=0)


@dataclass(frozen=True, slots=True)
class Confusion:
    """Counts of labelled rows, by label (rows) and the teacher's most likely class (columns)."""

    names: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    left_out: int
    """Number of classes combined in the last row and column; 0: every class is shown. The classes
    with the most disagreements are shown."""

    @property
    def numbered(self) -> bool:
        """Whether columns are headed by numbers, because there are many or a name is long."""
        return len(self.names) > 12 or max(map(len, self.names)) > 16

    @property
    def totals(self) -> tuple[int, ...]:
        """Labelled rows of each label."""
        return tuple(sum(line) for line in self.counts)


@dataclass(frozen=True, slots=True)
class Pair:
    """A label, and the different class that the teacher predicts for some of its rows."""

    label: str
    predicted: str
    count: int
    of_label: int
    """Rows with this label."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of the teacher with the labels, over the measured positions."""

    labelled: int
    unlabelled: int
    agreed: int
    most_frequent: str | None
    """The most frequent label; None: nothing is labelled."""
    most_frequent_count: int
    pairs: tuple[Pair, ...]
    """The most frequent disagreements."""
    other_pairs: int
    other_rows: int

    @property
    def accuracy(self) -> float:
        """Share of labelled positions where they agree, in [0, 1]; undefined without labels."""
        return self.agreed / self.labelled


def balance(
    labels: np.ndarray,
    predicted: np.ndarray,
    num_classes: int,
    name: Callable[[int], str],
    *,
    most: int = MOST_CLASSES,
    of: str = "classes",
) -> Balance:
    """Count how often each class is the label and how often it is predicted.

    Args:
        labels: (N,) integers in [0, num_classes), -100 if unknown.
        predicted: (N,) integers in [0, num_classes).
        name: returns the name of a class.
        most: number of classes to show. If there are more, the most frequent are shown and the rest
            is combined.
        of: what the classes are called.
    """
    of_labels = np.bincount(labels[labels != NO_LABEL], minlength=num_classes)
    of_teacher = np.bincount(predicted, minlength=num_classes)
    shown = np.arange(num_classes)
    if num_classes > most:
        shown = np.lexsort((shown, -of_teacher, -of_labels))[:most]
    rest = num_classes - len(shown)
    return Balance(
        tuple(ClassCount(name(i), int(of_labels[i]), int(of_teacher[i])) for i in shown.tolist()),
        ClassCount(
            f"{rest:,} other {of}",
            int(of_labels.sum() - of_labels[shown].sum()),
            int(of_teacher.sum() - of_teacher[shown].sum()),
        )
        if rest
        else None,
        int(of_labels.sum()),
        len(predicted),
        num_classes,
        int((of_labels == 0).sum()),
        int((of_teacher == 0).sum()),
    )


def agreement(labels: np.ndarray, predicted: np.ndarray, name: Callable[[int], str]) -> Agreement:
    """Count how often the teacher's most likely class is the label, and the frequent disagreements.

    Shapes are as in `balance`.
    """
    known = labels != NO_LABEL
    labels, predicted, unlabelled = labels[known], predicted[known], int((~known).sum())
    pairs, counts = _pair_counts(labels, predicted)
    values, rows = np.unique(labels, return_counts=True)
    of_label = dict(zip(values.tolist(), rows.tolist(), strict=True))
    wrong = np.flatnonzero(pairs[:, 0] != pairs[:, 1])
    wrong = wrong[np.argsort(-counts[wrong], kind="stable")]
    shown = wrong[:_MOST_PAIRS]
    return Agreement(
        labelled=len(labels),
        unlabelled=unlabelled,
        agreed=int((labels == predicted).sum()),
        most_frequent=name(int(values[rows.argmax()])) if len(values) else None,
        most_frequent_count=int(rows.max(initial=0)),
        pairs=tuple(
            Pair(name(a), name(b), count, of_label[a])
            for (a, b), count in zip(pairs[shown].tolist(), counts[shown].tolist(), strict=True)
        ),
        other_pairs=len(wrong) - len(shown),
        other_rows=int(counts[wrong].sum() - counts[shown].sum()),
    )


def confusion(
    labels: np.ndarray, predicted: np.ndarray, names: Sequence[str], *, most: int = MOST_CLASSES
) -> Confusion | None:
    """Return the confusion matrix, or None if nothing is labelled.

    Of more than `most` classes, those with the most disagreements are shown, and the others are
    combined. Counts always sum to the number of labelled rows. Memory is O(most^2 + N).
    """
    known = labels != NO_LABEL
    if not known.any():
        return None
    labels, predicted, count = labels[known], predicted[known], len(names)
    shown = np.arange(count)
    if count > most:
        wrong = labels != predicted
        errors = np.bincount(labels[wrong], minlength=count) + np.bincount(predicted[wrong], minlength=count)
        frequent = np.bincount(labels, minlength=count)
        shown = np.sort(np.lexsort((shown, -frequent, -errors))[:most])
    left_out = count - len(shown)
    place = np.full(count, len(shown))
    place[shown] = np.arange(len(shown))
    table = np.zeros((len(shown) + bool(left_out),) * 2, dtype=np.int64)
    np.add.at(table, (place[labels], place[predicted]), 1)
    others = [f"{left_out:,} other classes"] if left_out else []
    return Confusion(tuple([names[i] for i in shown.tolist()] + others), tuple(map(tuple, table.tolist())), left_out)


def _pair_counts(labels: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the (P, 2) distinct pairs and their (P,) counts."""
    pairs, counts = np.unique(np.stack([labels, predicted], 1).astype(np.int64), axis=0, return_counts=True)
    return pairs, counts
