"""The metric that models are compared by: the task's, or bits per byte if tokenizers differ."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipeline.records import Predictions
from pipeline.tasks import Task

BITS_PER_BYTE = "bits_per_byte"
#: Metrics per token, which cannot be compared between tokenizers.
OF_TOKENS = ("loss", "perplexity", "accuracy")


@dataclass(frozen=True, slots=True)
class Basis:
    """The metric by which models of one task are compared."""

    task: Task
    in_bytes: bool = False
    """Whether a model has another tokenizer than the teacher. Losses are then compared per byte of
    text, not per token."""

    @property
    def main_metric(self) -> str:
        """The metric that retention is computed from."""
        return BITS_PER_BYTE if self.in_bytes else self.task.main_metric

    @property
    def higher_is_better(self) -> bool:
        """Whether higher values of the main metric are better."""
        return self.task.higher_is_better and not self.in_bytes

    def row_scores(self, found: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """Per-row scores and weights; the main metric is the ratio of their totals.

        In bytes, the weight of a row depends on the model: truncation or a longer first token
        leaves fewer predicted bytes.

        Returns:
            (R,) sums (bits if `in_bytes`) and (R,) weights (bytes if `in_bytes`).
        """
        scores, weights = self.task.row_scores(found)
        if not self.in_bytes:
            return scores, weights
        return scores / math.log(2), found.row_text_bytes.astype(np.float64)


def on_bytes_of(scores: np.ndarray, num_bytes: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rescale the sums of rows to the number of bytes that another model predicts.

    Args:
        scores: (R,) sums.
        num_bytes: (R,) bytes that each sum covers.
        reference: (R,) bytes that the other model predicts in each row.

    Returns:
        (R,) sums and (R,) bytes; both are 0 for rows with `num_bytes` 0.
    """
    known = num_bytes > 0
    a_byte = np.divide(scores, num_bytes, where=known, out=np.zeros_like(scores))
    return a_byte * reference, np.where(known, reference, 0)
