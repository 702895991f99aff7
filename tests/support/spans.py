"""Batches with aligned spans that need no second tokenizer.

Spans are pairs of a row's tokens, with a log-probability that depends on these tokens alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from pipeline.records import RowBlock, Spans, StudentBatch
from pipeline.training.batches.collate import Collator


@dataclasses.dataclass(frozen=True, slots=True)
class SpanCollator(Collator):
    """Makes the batches of `Collator` with spans."""

    def collate_block(self, block: RowBlock, counts: np.ndarray | None = None) -> StudentBatch:
        batch = Collator.collate_block(self, block, counts)
        return dataclasses.replace(batch, spans=pairs(batch))


def pairs(batch: StudentBatch) -> Spans:
    """Return spans over positions 0 and 1 of a row, 2 and 3, and so on.

    An odd last position is in no span. Weights differ, and are 0 for rows that do not count.
    """
    owner, logprobs, weights = [], [], []
    start = 0
    for count in batch.supervised.sum(1).tolist():
        for first in range(start, start + count - 1, 2):
            owner += [len(logprobs)] * 2
            tokens = int(batch.labels[first : first + 2].sum())
            logprobs.append(-0.2 - tokens % 7)
            weights.append(float(batch.weights[first]) * (1 + tokens % 3))
        owner += [-1] * (count % 2)
        start += count
    return Spans(torch.tensor(owner), torch.tensor(logprobs), torch.tensor(weights))


def with_spans(trainer: Any) -> Any:
    """Make the trainer's batches include spans."""
    fields = {field.name: getattr(trainer.collator, field.name) for field in dataclasses.fields(trainer.collator)}
    trainer.collator = SpanCollator(**fields)
    return trainer
