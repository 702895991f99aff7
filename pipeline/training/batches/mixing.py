"""Train one student on several caches: teachers of the same rows, or different data.

Teachers: rows are paired by `content_hash`, and the soft term is sum_t w_t D(teacher t, student),
with each D over the classes that the teacher's cache keeps. This is exact for every encoding and
divergence; for forward KL, its gradient is that of the mixture of the teachers. Data: the rows of
all caches are concatenated and shuffled together.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.cache import Cache, CacheDataset
from pipeline.cache.format.codec import tokens_of
from pipeline.cache.format.moments import scale_of
from pipeline.cache.format.rows import gather
from pipeline.errors import ContractError, MisuseError, TrainingError
from pipeline.records import NO_LABEL, CachedExample, Manifest, RowBlock, Segment, StudentBatch, Target
from pipeline.training.batches.collate import Collator, Picked, to_tensors


@dataclass(frozen=True)
class Mixture:
    """The caches after the first, and the share of each cache including the first."""

    kind: Literal["teachers", "data"]
    others: tuple[Cache, ...]
    shares: tuple[float, ...] | None
    """Weights of the teachers, or shares of an epoch's rows; they sum to 1. None: data, and every
    epoch has each row once."""


def make_mixture(
    caches: Sequence[Cache], kind: Literal["teachers", "data"] | None, shares: Sequence[float]
) -> Mixture | None:
    """Check that caches can be mixed, and normalise their shares.

    Args:
        shares: one per cache, in any unit. Empty: teachers have equal weights, and each row of data
            is used once per epoch.

    Returns:
        None for one cache.

    Raises:
        MisuseError: the number of shares is not that of the caches, or `kind` is None.
        ContractError: names the first property in which two caches differ.
    """
    if len(caches) < 2:
        return None
    kind = checked_kind(len(caches), kind, shares)
    for other in caches[1:]:
        _check_alike(caches[0], other, same_encoding=kind == "data")
    given = list(shares) or ([1.0] * len(caches) if kind == "teachers" else [])
    return Mixture(kind, tuple(caches[1:]), tuple(share / sum(given) for share in given) or None)


def checked_kind(
    caches: int, kind: Literal["teachers", "data"] | None, shares: Sequence[float]
) -> Literal["teachers", "data"]:
    """Return how several caches are mixed.

    Raises:
        MisuseError: as in `make_mixture`.
    """
    if kind is None:
        raise MisuseError(
            "several --cache: say --mix teachers (the same rows, labelled by each) or --mix data (different rows)"
        )
    if shares and (len(shares) != caches or not all(0 < share < float("inf") for share in shares)):
        flag = "--teacher-weight" if kind == "teachers" else "--proportion"
        raise MisuseError(
            f"{flag}: expected {caches} above 0, one for each --cache, found {', '.join(map(str, shares)) or 'none'}"
        )
    return kind


def _check_alike(first: Cache, other: Cache, *, same_encoding: bool) -> None:
    ours, theirs = first.as_captured.manifest.contract, other.as_captured.manifest.contract
    pairs: list[tuple[str, Any, Any]] = [
        ("task", ours.task, theirs.task),
        ("number of classes", ours.num_classes, theirs.num_classes),
        ("labels", ours.label_names, theirs.label_names),
        ("tokenizer", ours.tokenizer.sha256, theirs.tokenizer.sha256),
    ]
    if not same_encoding:
        _check_scales(first, other)
    if same_encoding:
        pairs.append(("encoding", ours.encoding, theirs.encoding))
    for name, expected, found in pairs:
        if expected != found:
            raise ContractError(
                f"{other.root}: {name}: expected {expected}, as {first.root} has, found {found}; one student cannot learn from both"
            )


def _check_scales(first: Cache, other: Cache) -> None:
    """Refuse teachers whose scores are in different units, since a student has one unit.

    Raises:
        ContractError: the units differ.
    """
    ours, theirs = scale_of(first.as_captured.manifest), scale_of(other.as_captured.manifest)
    if ours is None or theirs is None or len(ours.std) != len(theirs.std):
        return
    if (np.abs(ours.mean - theirs.mean) > ours.std / 2).any() or not (
        np.abs(np.log(theirs.std / ours.std)) < np.log(1.5)
    ).all():
        raise ContractError(
            f"{other.root}: scores: expected a mean near {ours.mean.tolist()} and a standard deviation near {ours.std.tolist()}, as {first.root} has, found {theirs.mean.tolist()} and "
            f"{theirs.std.tolist()}; teachers of one student need scores in one unit: train it from one cache"
        )


class AlignedDataset(Dataset[tuple[CachedExample, ...]]):
    """Rows of one cache paired with the rows of equal content in others, in the first's order."""

    remote = None
    """None, so that row groups are not fetched in advance, even from a remote cache."""

    def __init__(self, caches: Sequence[Cache], split: str | Sequence[str], *, window: int) -> None:
        """Pair the rows of a split.

        Raises:
            CacheError: a cache has no such split.
            ContractError: a cache lacks rows of the first.
        """
        self.first = caches[0].dataset(split, window=window)
        self.starts, self.manifest, self.column, self.num_tokens = (
            self.first.starts,
            self.first.manifest,
            self.first.column,
            self.first.num_tokens,
        )
        wanted = self.first.column("content_hash")
        self.others = [
            (rows, _pair(wanted, rows, cache, split))
            for cache in caches[1:]
            for rows in (cache.dataset(split, window=2 * window),)
        ]

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: int) -> tuple[CachedExample, ...]:
        return (self.first[index], *(rows[int(where[index])] for rows, where in self.others))

    def segments(self, rows: np.ndarray) -> tuple[list[Segment], ...]:
        """Return the rows of each cache as contiguous segments."""
        return (self.first.segments(rows), *(other.segments(where[rows]) for other, where in self.others))


def _pair(wanted: np.ndarray, rows: CacheDataset, cache: Cache, split: str | Sequence[str]) -> np.ndarray:
    """Return (rows of the first,) int64: the index of each row in the other cache.

    Raises:
        ContractError: the other cache lacks rows.
    """
    found = rows.column("content_hash")
    order = np.argsort(found, kind="stable")
    place = np.minimum(np.searchsorted(found[order], wanted), len(found) - 1)
    where = order[place]
    missing = np.flatnonzero(found[where] != wanted)
    if len(missing):
        named = split if isinstance(split, str) else ", ".join(split)
        raise ContractError(
            f"{cache.root}: split {named}: expected each of the {len(wanted)} rows that the first cache has, found {len(missing)} missing (the first is row "
            f"{missing[0]}); let every teacher label the same rows, or mix different rows with --mix data"
        )
    return np.asarray(where, dtype=np.int64)


class JoinedDataset(Dataset[CachedExample]):
    """The concatenated rows of several caches."""

    remote = None
    """None, so that row groups are not fetched in advance, even from a remote cache."""

    def __init__(self, caches: Sequence[Cache], split: str | Sequence[str], *, window: int) -> None:
        self.parts = [cache.dataset(split, window=window) for cache in caches]
        self.bounds = np.cumsum([0, *(len(part) for part in self.parts)])
        """(caches + 1,): the first row of each cache, and the number of rows."""
        self.starts = np.concatenate(
            [[0], *(part.starts[1:] + bound for part, bound in zip(self.parts, self.bounds, strict=False))]
        )
        ids = "".join(cache.manifest.cache_id for cache in caches)
        joined = hashlib.sha256(ids.encode()).hexdigest()
        self.manifest: Manifest = dataclasses.replace(caches[0].manifest, cache_id=joined)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, index: int) -> CachedExample:
        part = int(np.searchsorted(self.bounds, index, side="right")) - 1
        return self.parts[part][index - int(self.bounds[part])]

    def segments(self, rows: np.ndarray) -> list[Segment]:
        """Return the rows as contiguous segments, each of one cache."""
        parts = np.searchsorted(self.bounds, rows, side="right") - 1
        cuts = np.flatnonzero(np.diff(parts)) + 1
        return [
            segment
            for run, part in zip(np.split(rows, cuts), parts[np.append(0, cuts)].tolist(), strict=True)
            for segment in self.parts[part].segments(run - self.bounds[part])
        ]

    def column(self, name: str) -> np.ndarray:
        """Return one plain column of all rows."""
        return np.concatenate([part.column(name) for part in self.parts])

    def num_tokens(self) -> np.ndarray:
        """Return (rows,) int64: the number of tokens of each row."""
        return np.concatenate([part.num_tokens() for part in self.parts])


@dataclass(frozen=True)
class Proportions:
    """Selects the rows of each epoch so that every cache has its share of them.

    An epoch has as many rows as possible without repeating one. The next epoch continues with other
    rows of each cache.
    """

    bounds: tuple[int, ...]
    shares: tuple[float, ...]
    keep: np.ndarray | None
    seed: int

    def __call__(self, epoch: int) -> np.ndarray:
        """Return (rows,) bool; the number of rows is the same in every epoch."""
        mask = np.zeros(self.bounds[-1], dtype=bool)
        pools = []
        for start, stop in zip(self.bounds, self.bounds[1:], strict=False):
            rows = np.arange(start, stop)
            pools.append(rows if self.keep is None else rows[self.keep[rows]])
        empty = next((number for number, pool in enumerate(pools, start=1) if not len(pool)), None)
        if empty is not None:
            raise TrainingError(
                f"--proportion: cache {empty} has no row to learn from (of {len(pools)}, in the order of --cache); leave it out, or "
                "capture more rows"
            )
        most = min(len(pool) / share for pool, share in zip(pools, self.shares, strict=True))
        for number, (pool, share) in enumerate(zip(pools, self.shares, strict=True)):
            count = min(len(pool), round(most * share))
            if not count:
                raise TrainingError(
                    f"--proportion: cache {number + 1} has no row in an epoch of {most:.1f} rows, the most that the other caches "
                    f"allow at their shares (its share is {share:.3g}); give it a larger share, or the other caches more rows"
                )
            order = np.random.default_rng([self.seed, number]).permutation(pool)
            mask[order[(epoch * count + np.arange(count)) % len(order)]] = True
        return mask


@dataclass(frozen=True, slots=True)
class TeachersCollator:
    """Collates rows of several teachers: positions once per teacher, hard labels with the first."""

    collator: Collator
    weights: tuple[float, ...]

    def __call__(self, rows: Picked) -> dict[str, Any]:
        """Collate a batch into nested tensors; called by `torch.utils.data.DataLoader`."""
        return to_tensors(self.collate(rows))

    def collate(self, rows: Picked) -> StudentBatch:
        """Collate B rows.

        Raises:
            ContractError: the teachers labelled different positions of a row.
        """
        blocks = [gather(part, names=self.collator.columns) for part in rows.parts]
        for other in blocks[1:]:
            _check_positions(blocks[0], other)
        batches = [self.collator.collate_block(block, rows.counts) for block in blocks]
        first, rest = batches[0], batches[1:]
        soft_weights = [weight * batch.soft_weights for weight, batch in zip(self.weights, batches, strict=True)]
        return dataclasses.replace(
            first,
            labels=torch.cat([first.labels, *(_unlabelled(batch.labels) for batch in rest)]),
            target=_stack([batch.target for batch in batches]),
            weights=torch.cat([first.weights, *(torch.zeros_like(batch.weights) for batch in rest)]),
            soft_weights=torch.cat(soft_weights),
            teacher_predicted=None
            if first.teacher_predicted is None
            else torch.cat([batch.teacher_predicted for batch in batches if batch.teacher_predicted is not None]),
        )


def _unlabelled(labels: Tensor) -> Tensor:
    return torch.full_like(labels, torch.nan if labels.is_floating_point() else NO_LABEL)


def _check_positions(first: RowBlock, other: RowBlock) -> None:
    ours, theirs = tokens_of(first).supervised, tokens_of(other).supervised
    if ours is None or theirs is None:
        differ = np.arange(len(first) if (ours is None) != (theirs is None) else 0)
    else:
        differ = np.flatnonzero(ours.counts != theirs.counts)
        if not len(differ):
            differ = np.searchsorted(ours.offsets, np.flatnonzero(ours.values != theirs.values), side="right") - 1
    if len(differ):
        raise ContractError(
            f"source row {first.numbers['source_row'][differ[0]]}: the teachers labelled different positions of this row; cache it again with the same columns and template"
        )


def _stack(targets: Sequence[Target]) -> Target:
    """Concatenate the positions of all targets, one teacher after another.

    If only some targets have a residual, the others get one with no mass.
    """
    counts = torch.cat([target.offsets.diff() for target in targets])
    offsets = torch.zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    residual: Tensor | None = None
    if any(target.log_residual is not None for target in targets):
        none = [torch.full((len(target),), -torch.inf) for target in targets]
        residual = torch.cat(
            [
                empty if target.log_residual is None else target.log_residual
                for target, empty in zip(targets, none, strict=True)
            ]
        )
    return Target(
        targets[0].num_classes,
        offsets,
        torch.cat([target.ids for target in targets]),
        torch.cat([target.weights for target in targets]),
        residual,
        torch.cat([target.negative_entropy for target in targets]),
        unit=None if targets[0].unit is None else torch.cat([t.unit for t in targets if t.unit is not None]),
        group=_stacked_groups([target.group for target in targets if target.group is not None]),
    )


def _stacked_groups(groups: Sequence[Tensor]) -> Tensor | None:
    """Concatenate the groups of all teachers, with different ids for each teacher."""
    if not groups:
        return None
    step = 1 + max(int(each.max()) for each in groups)
    return torch.cat([each + i * step for i, each in enumerate(groups)])
