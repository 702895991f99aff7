"""CachedExamples -> StudentBatch -> nested tensors that Trainer can move, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    SoftLabels,
    StudentBatch,
    Target,
    Tokenization,
    TokenizedExample,
)
from pipeline.softlabels import concatenate, target
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

    def __call__(self, rows: Sequence[tuple[CachedExample, bool]]) -> dict[str, Any]:
        """As `torch.utils.data.DataLoader` calls it."""
        return to_tensors(self.collate(rows))

    def collate(self, rows: Sequence[tuple[CachedExample, bool]]) -> StudentBatch:
        """B rows, the second of each pair saying whether it counts."""
        cached = [row for row, _ in rows]
        examples = [row.example for row in cached]
        if self.retokenize is not None:
            examples = _tokenize_anew(self.task, examples, self.tokenizer, self.retokenize)
        inputs, supervised = self.task.collate(examples, pad_id(self.tokenizer))
        soft = concatenate([row.soft for row in cached])
        counts = torch.tensor([len(row.soft) for row in cached])
        labels = torch.cat([torch.from_numpy(self.task.hard_labels(row.example)) for row in cached])
        if self.teacher_labels:
            labels, _ = teacher_argmax(soft)
        weights = torch.repeat_interleave(torch.tensor([float(counts_in) for _, counts_in in rows]), counts)
        entropy = torch.cat([_entropy(row) for row in cached])
        goal = target(soft, self.temperature, tail=self.tail, entropy=entropy)
        return StudentBatch(inputs, supervised, labels.masked_fill(weights == 0, NO_LABEL), goal, weights)


def _entropy(row: CachedExample) -> Tensor:
    """(N,) nats: of each position, or the row's mean where only its sum was stored."""
    if row.entropy is not None:
        return row.entropy
    mean = row.teacher_entropy_sum / max(len(row.soft), 1)
    return torch.full((len(row.soft),), 0.0 if math.isnan(mean) else mean)  # unknown: KL up to a constant


def teacher_argmax(soft: SoftLabels) -> tuple[Tensor, Tensor]:
    """(N,) int64 and (N,) nats: the teacher's most likely class, always among the kept, and its log-probability."""
    owner = torch.repeat_interleave(torch.arange(len(soft)), soft.top_offsets.diff())
    peak = torch.full((len(soft),), -torch.inf).scatter_reduce(0, owner, soft.top_logprobs, "amax")
    hits = (soft.top_logprobs == peak[owner]).nonzero().squeeze(-1)
    first = torch.full((len(soft),), len(soft.top_ids)).scatter_reduce(
        0, owner[hits], hits, "amin"
    )  # of ties, the first
    return soft.top_ids[first], peak


def to_tensors(batch: StudentBatch) -> dict[str, Any]:
    """Nested mappings of tensors: what Trainer and accelerate move between devices."""
    goal = batch.target
    tensors: dict[str, Any] = {
        "inputs": batch.inputs,
        "labels": batch.labels,
        "weights": batch.weights,
        "target": {
            "offsets": goal.offsets,
            "ids": goal.ids,
            "weights": goal.weights,
            "negative_entropy": goal.negative_entropy,
        },
    }
    if batch.supervised is not None:
        tensors["supervised"] = batch.supervised
    if goal.log_residual is not None:
        tensors["target"]["log_residual"] = goal.log_residual
    return tensors


def from_tensors(tensors: dict[str, Any], num_classes: int) -> StudentBatch:
    """The inverse of `to_tensors`."""
    goal = Target(
        num_classes=num_classes,
        log_residual=tensors["target"].get("log_residual"),
        **_without(tensors["target"], "log_residual"),
    )
    return StudentBatch(tensors["inputs"], tensors.get("supervised"), tensors["labels"], goal, tensors["weights"])


def _without(mapping: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: value for name, value in mapping.items() if name != key}


def _tokenize_anew(
    task: Task, examples: Sequence[TokenizedExample], tokenizer: PreTrainedTokenizerBase, settings: Tokenization
) -> list[TokenizedExample]:
    texts = [Example(source_row=e.source_row, text=e.text, text_pair=e.text_pair, label=e.label) for e in examples]
    tokenized = list(task.tokenize(texts, "", tokenizer, settings))
    return [item for item in tokenized if isinstance(item, TokenizedExample)]
