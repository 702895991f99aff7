"""The predictions of a teacher for a batch of rows: dense logits, or encoded soft labels."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from pipeline.capture import forward
from pipeline.errors import EncodingError
from pipeline.records import BadRow, SoftLabels, TeacherScores, TokenizedExample


@dataclass(frozen=True, slots=True)
class Labelled:
    """Soft labels of a batch, from a teacher that does not give all V logits."""

    soft: SoftLabels
    """N positions: those of all rows of the batch except the rows in `bad`, in order."""
    scores: TeacherScores
    """Scores of the same positions; nan if unknown."""
    bad: Mapping[int, str] = field(default_factory=dict)
    """Index of a row in the batch -> why it has no soft labels."""

    def checked(self) -> tuple[SoftLabels, TeacherScores]:
        """Return the soft labels and scores of every row of the batch.

        Raises:
            EncodingError: some row has no soft labels.
        """
        if self.bad:
            place, reason = next(iter(self.bad.items()))
            raise EncodingError(f"row {place} of the batch: {reason}")
        return self.soft, self.scores


Predicted = Tensor | Labelled
"""(N, V) float logits of the supervised positions, or soft labels."""


def faults(predicted: Predicted, rows: Sequence[TokenizedExample], split: str) -> dict[int, BadRow]:
    """Return a `BadRow` for each row of a batch that cannot be cached, by index in the batch."""
    if isinstance(predicted, Labelled):
        return {i: BadRow(split, rows[i].source_row, reason) for i, reason in predicted.bad.items()}
    return forward.broken_rows(rows, predicted, split)


def without(broken: Container[int], rows: Sequence[TokenizedExample], predicted: Predicted) -> Predicted:
    """Return the predictions of the rows that are not in `broken`."""
    if isinstance(predicted, Labelled):
        return Labelled(predicted.soft, predicted.scores)
    return forward.without(broken, rows, predicted)


def most_likely(predicted: Predicted) -> np.ndarray:
    """Return (N,) int64: the most likely class of each position."""
    if isinstance(predicted, Labelled):
        first: np.ndarray = predicted.soft.top_ids[predicted.soft.top_offsets[:-1]].numpy()
        return first
    found: np.ndarray = predicted.float().nan_to_num(-float("inf")).argmax(-1).cpu().numpy()
    return found
