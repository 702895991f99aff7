"""Unit and loss of the labels that a teacher of scores is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.records import Scale, TokenizedExample


def scale_of_labels(rows: Sequence[TokenizedExample]) -> Scale:
    """Return mean and standard deviation of the labels of each output."""
    labels = np.stack([row.labels for row in rows if row.labels is not None]).astype(np.float64)
    deviations = np.nanstd(labels, 0, ddof=1) if len(rows) > 1 else np.zeros(labels.shape[1])
    std = np.where(deviations > 0, deviations, 1.0)
    return Scale(np.nan_to_num(np.nanmean(labels, 0)).astype(np.float32), std.astype(np.float32))


@dataclass(frozen=True, slots=True)
class ScoreLoss:
    """Mean squared error in standard deviations, over the known labels.

    An output therefore does not get a larger weight because its unit is small.
    """

    scale: Scale

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Return the loss; called by `Trainer` as its `compute_loss_func`.

        `labels`: (B, outputs), nan where there is none.
        """
        std = torch.from_numpy(self.scale.std).to(labels.device)
        errors = ((outputs.logits.view_as(labels) - labels) / std).square()
        total = torch.where(labels.isnan(), 0.0, errors).sum()
        return total / (labels.isfinite().sum() if num_items_in_batch is None else num_items_in_batch)
