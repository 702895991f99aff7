"""The metric of comparison: the task's, or bits per byte if tokenizers differ."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipeline.records import Predictions
from pipeline.tasks import Task

BITS_PER_BYTE = "bits_per_byte"
#: Numbers a token, which say nothing between tokenizers.
OF_TOKENS = ("loss", "perplexity", "accuracy")


@dataclass(frozen=True, slots=True)
class Basis:
    """What models of one task are compared by."""

    task: Task
    in_bytes: bool = False
    """Whether one of them has another tokenizer than the teacher: then losses are compared a byte
    of text, not a token."""

    @property
    def main_metric(self) -> str:
        """What retention is taken of."""
        return BITS_PER_BYTE if self.in_bytes else self.task.main_metric

    @property
    def higher_is_better(self) -> bool:
        """Of the main metric."""
        return self.task.higher_is_better and not self.in_bytes

    def row_scores(self, found: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """(R,) sums and (R,) weights whose ratio of totals is the main metric.

        A row that is cut, or that begins with a longer token, has fewer bytes that are predicted
        than it has for another model.
        """
        scores, weights = self.task.row_scores(found)
        if not self.in_bytes:
            return scores, weights
        return scores / math.log(2), found.row_text_bytes.astype(np.float64)


def on_bytes_of(scores: np.ndarray, num_bytes: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of rows as if each row had the bytes that another model predicts of it.

    Args:
        scores: (R,) sums.
        num_bytes: (R,) that they are of.
        reference: (R,) bytes of the other model.

    Returns:
        (R,) sums and (R,) bytes; 0 where the row has no bytes.
    """
    known = num_bytes > 0
    a_byte = np.divide(scores, num_bytes, where=known, out=np.zeros_like(scores))
    return a_byte * reference, np.where(known, reference, 0)
