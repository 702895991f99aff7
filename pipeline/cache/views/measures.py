"""Measure agreement, entropy, kept mass and more over a sample of rows of a split.

Rows are spread over the split, and memory is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.cache.reading.reader import Cache, CacheDataset
from pipeline.cache.views.samples import text_of
from pipeline.cache.views.tokens import in_context, words_of
from pipeline.records import NO_LABEL, CachedExample, Full, SoftLabels, Target
from pipeline.softlabels import concatenate, most_likely, served_temperature, target
from pipeline.tasks import get_task
from pipeline.tasks.images.pixels import thumbnail

#: Most positions that are measured; for `full`, most positions times V. Rows are measured whole.
_POSITIONS, _CLASSES = 50_000, 20_000_000
#: Least number of row groups from which the rows of a larger split are taken.
_GROUPS = 24
#: Positions processed at once; for `full`, positions times V.
_CHUNK_POSITIONS, _CHUNK_CLASSES = 4096, 4_000_000
#: Number of confident disagreements to keep, and characters of the text of each.
_DISAGREEMENTS, _CHARACTERS = 6, 400


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A row, or a word, whose label is not the teacher's most likely class."""

    source_row: int
    label: int
    predicted: int
    confidence: float
    """The teacher's weight on its most likely class."""
    text: str
    """Text of the row; a word is in brackets, in its context."""
    image: str = ""
    """A `data:` URI of the row's thumbnail."""


@dataclass(frozen=True, slots=True)
class SplitMeasures:
    """Measures of R rows of one split, with N positions."""

    split: str
    rows: int
    """Rows of the whole split; `positions` counts the whole split too."""
    positions: int
    lengths: np.ndarray
    """(R,) int64: tokens of each measured row."""
    labels: np.ndarray
    """(N,) int64: the hard labels, -100 if unknown."""
    predicted: np.ndarray
    """(N,) int64: the teacher's most likely class."""
    confidence: np.ndarray
    """(N,) float64: the weight of that class."""
    entropy: np.ndarray
    """Nats: (N,) if it is known by position, else (R,) means over each row; nan if unknown."""
    by_position: bool
    """Whether `entropy` is by position."""
    kept_mass: np.ndarray
    """(N,) float64: the mass on the classes that are kept for certain; empty for `full`."""
    kept_classes: np.ndarray
    """(N,) int64: the number of stored classes; empty for `full`."""
    ranks: np.ndarray
    """(N,) int64: rank of the hard label in the teacher's order, from 1; 0: not in the top; -1: no
    hard label."""
    nll: np.ndarray
    """(R,) float64: the teacher's negative log-likelihood of the hard labels, summed over the row,
    nats; nan: unknown."""
    disagreements: tuple[Disagreement, ...]
    """Classifiers: the most confident disagreements, in descending order."""


def measure(cache: Cache, split: str, *, most: int = _POSITIONS) -> SplitMeasures:
    """Measure rows of a split: all of a small split, else enough to reach `most` positions.

    Raises:
        CacheError: there is no such split.
        IntegrityError: a row group that is read is damaged.
    """
    contract = cache.manifest.contract
    dataset = cache.dataset(split, window=1)
    shards = cache.manifest.split_shards(split)
    positions = sum(shard.positions for shard in shards)
    if isinstance(contract.encoding, Full):
        most = min(most, max(1, _CLASSES // contract.num_classes))
    found = _Found(cache)
    for chunk in _chunks(_rows(dataset, positions, most), contract.num_classes):
        found.add(chunk)
    return found.measures(split, len(dataset), positions)


def _rows(dataset: CacheDataset, positions: int, most: int) -> Iterator[CachedExample]:
    """Yield all rows, or the first rows of row groups spread over the split.

    Each row group contributes about the same number of positions.
    """
    groups = len(dataset.groups)
    if positions > most:
        groups = min(groups, max(_GROUPS, math.ceil(most * groups / positions)))
    seen = 0
    for i, group in enumerate(np.linspace(0, len(dataset.groups) - 1, groups).round().astype(int).tolist()):
        share = most * (i + 1) / groups
        for number in range(int(dataset.starts[group]), int(dataset.starts[group + 1])):
            if positions > most and seen >= share:
                break
            row = dataset[number]
            seen += len(row.soft)
            yield row


def _chunks(rows: Iterator[CachedExample], num_classes: int) -> Iterator[list[CachedExample]]:
    chunk: list[CachedExample] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row.soft)
        kept = num_classes if isinstance(row.soft.encoding, Full) else 1
        if size >= _CHUNK_POSITIONS or size * kept >= _CHUNK_CLASSES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Found:
    """Accumulates the measures of chunks of rows."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._task = get_task(cache.manifest.contract.task)
        self._by_position = "entropy" in cache.manifest.contract.columns or isinstance(
            cache.manifest.contract.encoding, Full
        )
        self._arrays: dict[str, list[np.ndarray]] = {name: [] for name in _ARRAYS}
        self._disagreements: list[Disagreement] = []

    def add(self, rows: Sequence[CachedExample]) -> None:
        soft = concatenate([row.soft for row in rows])
        stored = [row.entropy for row in rows if row.entropy is not None]
        entropy = torch.cat(stored).float() if stored else None
        goal = target(soft, served_temperature(soft.encoding), entropy=entropy)
        labels = self._task.hard_labels([row.example for row in rows])
        predicted = most_likely(soft)[0].numpy()
        full = isinstance(soft.encoding, Full)
        confidence = _confidence(goal, full)
        means = [row.teacher_entropy_sum / max(len(row.soft), 1) for row in rows]
        by_position = -goal.negative_entropy.numpy() if entropy is None else entropy.numpy()
        parts = {
            "lengths": np.asarray([row.example.num_tokens for row in rows]),
            "labels": labels,
            "predicted": predicted,
            "confidence": confidence,
            "entropy": by_position if self._by_position else np.asarray(means, dtype=np.float64),
            "kept_mass": np.zeros(0) if full else _kept_mass(soft, goal),
            "kept_classes": np.zeros(0, dtype=np.int64) if full else goal.offsets.diff().numpy(),
            "ranks": _ranks(soft, labels),
            "nll": np.asarray([row.teacher_nll_sum for row in rows], dtype=np.float64),
        }
        for name, part in parts.items():
            self._arrays[name].append(part)
        if not self._task.predicts_tokens and self._task.names != "places":
            self._add_disagreements(rows, labels, predicted, confidence)

    def _add_disagreements(
        self, rows: Sequence[CachedExample], labels: np.ndarray, predicted: np.ndarray, confidence: np.ndarray
    ) -> None:
        """Keep the most confident disagreements; texts are made only for the few candidates."""
        ends = np.cumsum([len(row.soft) for row in rows])  # (R,)
        wrong = np.flatnonzero((labels != predicted) & (labels != NO_LABEL))
        for i in wrong[np.argsort(-confidence[wrong], kind="stable")][:_DISAGREEMENTS].tolist():
            number = int(np.searchsorted(ends, i, side="right"))
            row = rows[number]
            text = self._text(row, i - int(ends[number]) + len(row.soft))
            self._disagreements.append(
                Disagreement(
                    row.example.source_row,
                    int(labels[i]),
                    int(predicted[i]),
                    float(confidence[i]),
                    text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]}…",
                    "" if row.example.image is None else thumbnail(row.example.image.data, row.example.view),
                )
            )
        self._disagreements = sorted(self._disagreements, key=lambda d: -d.confidence)[:_DISAGREEMENTS]

    def _text(self, row: CachedExample, position: int) -> str:
        """Return the text of a position: the text of its row, or a word in its context."""
        if row.example.labels is not None and row.example.supervised is None:
            names = self._cache.manifest.contract.label_names or ()
            return f"{names[position]}: {' '.join(text_of(self._cache, row).split())}"
        if row.example.labels is not None:
            return in_context(words_of(self._cache.tokenizer, row.example), position)
        return " ".join(text_of(self._cache, row).split())

    def measures(self, split: str, rows: int, positions: int) -> SplitMeasures:
        arrays = {
            name: np.concatenate(parts) if parts else np.zeros(0, dtype=_ARRAYS[name])
            for name, parts in self._arrays.items()
        }
        return SplitMeasures(
            split,
            rows,
            positions,
            by_position=self._by_position,
            disagreements=tuple(self._disagreements),
            **arrays,
        )


_ARRAYS: dict[str, type] = {
    "lengths": np.int64,
    "labels": np.int64,
    "predicted": np.int64,
    "confidence": np.float64,
    "entropy": np.float64,
    "kept_mass": np.float64,
    "kept_classes": np.int64,
    "ranks": np.int64,
    "nll": np.float64,
}


def _kept_mass(soft: SoftLabels, goal: Target) -> np.ndarray:
    """Return the (N,) mass on the classes that are kept for certain."""
    if goal.log_residual is not None:
        return np.asarray(1 - goal.log_residual.double().exp().numpy())
    weights = soft.top_logprobs.double().exp().numpy()
    return np.add.reduceat(weights, soft.top_offsets[:-1].numpy()) if len(weights) else weights


def _confidence(goal: Target, is_full: bool) -> np.ndarray:
    """Return the (N,) weight of the most likely class.

    It is always kept; encodings other than `full` store it first.
    """
    weights: np.ndarray = goal.weights.double().numpy()
    if is_full:
        return np.asarray(weights.reshape(len(goal), goal.num_classes).max(1))
    return np.asarray(weights[goal.offsets[:-1].numpy()])


def _ranks(soft: SoftLabels, labels: np.ndarray) -> np.ndarray:
    """Return the (N,) int64 ranks of the hard labels; see `SplitMeasures`."""
    known = labels != NO_LABEL
    if isinstance(soft.encoding, Full):
        dense = soft.top_logprobs.view(len(soft), soft.num_classes)
        wanted = torch.from_numpy(np.where(known, labels, 0))[:, None]
        places = 1 + (dense > dense.gather(1, wanted)).sum(1).numpy()
        return np.where(known, places, -1)
    starts = soft.top_offsets.numpy()
    owner = np.repeat(np.arange(len(soft)), np.diff(starts))
    hit = np.flatnonzero(soft.top_ids.numpy() == labels[owner])
    ranks = np.where(known, 0, -1)
    ranks[owner[hit]] = hit - starts[owner[hit]] + 1
    return ranks
