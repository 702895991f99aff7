"""Batches of rows with hard labels, in the form that the losses of `transformers` models expect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.records import NO_LABEL, TokenizedExample
from pipeline.tasks import Task

#: Upper bound on the choices of a row.
_MOST_CHOICES = 1 << 10


def choice_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Return the mean cross-entropy of rows over their choices; a `compute_loss_func` of Trainer.

    Args:
        outputs: with `logits`, (B, C).
        labels: (B,) int64: the correct choice + `_MOST_CHOICES` * the row's number of choices.
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
    """A data set of rows in memory."""

    rows: Sequence[TokenizedExample]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenizedExample:
        return self.rows[index]


@dataclass(frozen=True, slots=True)
class LabelledCollator:
    """Collates rows into inputs with `labels` in the form that the model's own loss expects.

    Depending on the task there is one label per row, a label at each position, a label at the next
    token, or a start and an end position.
    """

    task: Task
    pad_id: int
    processor: Any

    def __call__(self, rows: Sequence[TokenizedExample]) -> dict[str, Tensor]:
        """Collate a batch; called by `torch.utils.data.DataLoader`."""
        inputs, supervised = self.task.collate(rows, self.pad_id, processor=self.processor)
        if "labels" in inputs:
            return inputs
        labels = torch.from_numpy(self.task.hard_labels(rows))
        if self.task.reads == "choices" and supervised is not None:  # decoded by `choice_loss`
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
        tokens[:, 1:][supervised[:, :-1]] = labels  # the token that position t predicts is at t + 1
        return {**inputs, "labels": tokens}
