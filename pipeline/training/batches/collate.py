"""CachedExamples -> StudentBatch -> nested tensors that Trainer can move, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from pipeline.cache import CacheDataset
from pipeline.models import pad_id
from pipeline.records import (
    NO_LABEL,
    CachedExample,
    Example,
    Full,
    PositionWeights,
    StudentBatch,
    Target,
    Tokenization,
    TokenizedExample,
)
from pipeline.softlabels import concatenate, target, teacher_argmax
from pipeline.tasks import Task


@dataclass(frozen=True)
class TrainingRows(Dataset[tuple[CachedExample, bool]]):
    """Rows by number, and whether they count: `~i` is row i with weight zero (see `BatchOrder`)."""

    dataset: CacheDataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[CachedExample, bool]:
        return self.dataset[index if index >= 0 else ~index], index >= 0


@dataclass(frozen=True, slots=True)
class Collator:
    """Makes batches of one student: its inputs, the hard labels, the teacher's distribution."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    temperature: float
    tail: str = "ghost"
    retokenize: Tokenization | None = None
    """Where the student's tokenizer is not the cache's: tokenize the stored text anew."""
    teacher_labels: bool = False
    """The teacher's most likely class stands for the hard label."""
    position_weights: PositionWeights = "equal"
    pad_id: int | None = None
    """What rows are padded with; None: as the tokenizer says."""
    for_evaluation: bool = False
    """Say also what the teacher predicts."""

    def __call__(self, rows: Sequence[tuple[CachedExample, bool]]) -> dict[str, Any]:
        """As `torch.utils.data.DataLoader` calls it."""
        return to_tensors(self.collate(rows))

    def collate(self, rows: Sequence[tuple[CachedExample, bool]]) -> StudentBatch:
        """B rows, the second of each pair saying whether it counts."""
        cached = [row for row, _ in rows]
        examples = [row.example for row in cached]
        if self.retokenize is not None:
            examples = _tokenize_anew(self.task, examples, self.tokenizer, self.retokenize)
        inputs, supervised = self.task.collate(examples, pad_id(self.tokenizer) if self.pad_id is None else self.pad_id)
        soft = concatenate([row.soft for row in cached])
        counts = np.array([len(row.soft) for row in cached])
        labels = torch.from_numpy(np.concatenate([self.task.hard_labels(row.example) for row in cached]))
        if self.teacher_labels:
            labels, _ = teacher_argmax(soft)
        weights = torch.from_numpy(np.repeat(np.array([counts_in for _, counts_in in rows], dtype=np.float32), counts))
        entropy = _entropy(cached, counts)
        goal = target(soft, self.temperature, tail=self.tail, entropy=entropy)
        return StudentBatch(
            inputs=inputs,
            supervised=supervised,
            labels=labels.masked_fill(weights == 0, NO_LABEL),
            target=goal,
            weights=weights,
            soft_weights=weights
            * self._position_weights(-goal.negative_entropy if isinstance(soft.encoding, Full) else entropy, goal),
            source_rows=torch.tensor([row.example.source_row for row in cached]),
            teacher_predicted=teacher_argmax(soft)[0] if self.for_evaluation else None,
            text_bytes=torch.tensor([row.example.text_bytes * counts_in for row, counts_in in rows])
            if self.for_evaluation
            else None,
        )

    def _position_weights(self, entropy: Tensor, goal: Target) -> Tensor:
        """(N,) in [0, 1]: what the teacher's entropy, as a share of the largest possible, makes of each position."""
        if self.position_weights == "equal":
            return torch.ones_like(entropy)
        share = (entropy / math.log(goal.num_classes)).clamp(0, 1)
        return share if self.position_weights == "uncertainty" else 1 - share


def _entropy(rows: Sequence[CachedExample], counts: np.ndarray) -> Tensor:
    """(N,) nats: of each position, or the mean of its row where only the sum was stored."""
    if rows[0].entropy is not None:
        return torch.cat([row.entropy for row in rows if row.entropy is not None])
    means = np.array([row.teacher_entropy_sum for row in rows]) / np.maximum(counts, 1)
    return torch.from_numpy(np.repeat(np.nan_to_num(means).astype(np.float32), counts))  # unknown: KL up to a constant


def to_tensors(batch: StudentBatch) -> dict[str, Any]:
    """Nested mappings of tensors: what Trainer and accelerate move between devices."""
    goal = batch.target
    tensors: dict[str, Any] = {
        "inputs": batch.inputs,
        "labels": batch.labels,
        "weights": batch.weights,
        "soft_weights": batch.soft_weights,
        "source_rows": batch.source_rows,
        "target": {
            "offsets": goal.offsets,
            "ids": goal.ids,
            "weights": goal.weights,
            "negative_entropy": goal.negative_entropy,
        },
    }
    for name in ("supervised", "teacher_predicted", "text_bytes"):
        if getattr(batch, name) is not None:
            tensors[name] = getattr(batch, name)
    if goal.log_residual is not None:
        tensors["target"]["log_residual"] = goal.log_residual
    return tensors


def from_tensors(tensors: Mapping[str, Any], num_classes: int) -> StudentBatch:
    """The inverse of `to_tensors`."""
    parts = {"supervised": None, **tensors, "target": target_from_tensors(tensors["target"], num_classes)}
    return StudentBatch(**parts)


def target_from_tensors(tensors: Mapping[str, Tensor], num_classes: int) -> Target:
    """The target's part of it."""
    parts = dict(tensors)
    return Target(num_classes=num_classes, log_residual=parts.pop("log_residual", None), **parts)


def _tokenize_anew(
    task: Task, examples: Sequence[TokenizedExample], tokenizer: PreTrainedTokenizerBase, settings: Tokenization
) -> list[TokenizedExample]:
    texts = [Example(source_row=e.source_row, text=e.text, text_pair=e.text_pair, label=e.label) for e in examples]
    tokenized = list(task.tokenize(texts, "", tokenizer, settings))
    return [item for item in tokenized if isinstance(item, TokenizedExample)]
