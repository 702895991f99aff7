"""Rows with hard labels -> what the loss of a model of `transformers` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.records import NO_LABEL, TokenizedExample
from pipeline.tasks import Task

#: More choices than a row has.
_MOST_CHOICES = 1 << 10


def choice_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The mean cross-entropy of rows over the choices that each has: `compute_loss_func` of `transformers.Trainer`.

    Args:
        outputs: with `logits`, (B, C).
        labels: (B,) int64, the right choice and, times `_MOST_CHOICES`, how many the row has.
        num_items_in_batch: rows in all accumulated batches; None: those here.
    """
    logits: Tensor = outputs.logits
    counts = labels // _MOST_CHOICES
    missing = torch.arange(logits.shape[1], device=logits.device) >= counts[:, None]
    known = logits.masked_fill(missing, -torch.inf)
    total = torch.nn.functional.cross_entropy(known, labels % _MOST_CHOICES, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


@dataclass(frozen=True)
class LabelledRows(Dataset[TokenizedExample]):
    """Rows in memory, by number."""

    rows: Sequence[TokenizedExample]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenizedExample:
        return self.rows[index]


@dataclass(frozen=True, slots=True)
class LabelledCollator:
    """Inputs, and `labels` where the model's own loss looks for them: one a row, at its position, shifted by one token, or as two places."""

    task: Task
    pad_id: int
    processor: Any

    def __call__(self, rows: Sequence[TokenizedExample]) -> dict[str, Tensor]:
        """As `torch.utils.data.DataLoader` calls it."""
        inputs, supervised = self.task.collate(rows, self.pad_id, processor=self.processor)
        if "labels" in inputs:
            return inputs
        labels = torch.from_numpy(self.task.hard_labels(rows))
        if self.task.reads == "choices" and supervised is not None:  # as `choice_loss` reads them
            return {**inputs, "labels": labels + _MOST_CHOICES * supervised.sum(1)}
        if self.task.names == "places":
            return {**inputs, "start_positions": labels[::2], "end_positions": labels[1::2]}
        if self.task.names == "positions":
            return {**inputs, "labels": labels.view(len(rows), -1).float()}
        if supervised is None:
            return {**inputs, "labels": labels}
        tokens = torch.full(supervised.shape, NO_LABEL)
        if self.task.label_source in ("positions", "hidden"):
            tokens[supervised] = labels
            return {**inputs, "labels": tokens}
        tokens[:, 1:][supervised[:, :-1]] = labels  # what position t predicts stands at t + 1
        return {**inputs, "labels": tokens}
