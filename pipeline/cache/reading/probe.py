"""The alignment probe: is a cache in step with its tokens? From the cache alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.cache.format.codec import unpack_soft
from pipeline.cache.format.rows import gather
from pipeline.records import AlignmentProbe, Full, RowBlock, Shard
from pipeline.softlabels import served_temperature, target
from pipeline.softlabels.ragged import owners

_POSITIONS = 20_000
_STANDARD_ERRORS = 4.0
_ENOUGH = 1000


def probe_alignment(blocks: Iterable[RowBlock]) -> AlignmentProbe | None:
    """Compare the mean target weight of the hard label with that of its neighbours.

    A position predicts the token after it, so the weights of the soft labels should be large there:
    shift 0. Weights of classes that were not kept count as 0; the mean is linear in the weights, so
    it is unbiased for a sampled target.

    Returns:
        Misaligned: a neighbour wins by more than 4 paired standard errors over at least 1,000
            positions, where shift 0's mean exceeds
        3/V. Inconclusive: neither wins (a random model with tied embeddings predicts its own input
            best). None: no token classes.
    """
    columns: list[np.ndarray] = []
    seen = 0
    num_classes = 1
    for block in blocks:
        if "supervised" not in block.lists or "position_labels" in block.lists:
            return None
        num_classes = block.num_classes
        columns.append(_weights(_until(block, _POSITIONS - seen)))
        seen += len(columns[-1])
        if seen >= _POSITIONS:
            break
    if seen == 0:
        return None
    weights = np.concatenate(columns)  # (N, 3): previous, aligned, following
    previous, aligned, following = (float(mean) for mean in weights.mean(0))
    lead = [_lead(weights[:, 1] - weights[:, other]) for other in (0, 2)]
    if min(lead) > _STANDARD_ERRORS:
        verdict = "aligned"
    elif min(lead) < -_STANDARD_ERRORS and seen >= _ENOUGH and aligned > 3 / num_classes:
        verdict = "misaligned"
    else:
        verdict = "inconclusive"
    return AlignmentProbe(seen, previous, aligned, following, verdict)  # type: ignore[arg-type]


def first_shards(shards: Iterable[Shard]) -> tuple[Shard, ...]:
    """As many shards as the probe reads."""
    found: list[Shard] = []
    for shard in shards:
        if sum(other.positions for other in found) >= _POSITIONS:
            break
        found.append(shard)
    return tuple(found)


def _until(block: RowBlock, positions: int) -> RowBlock:
    """The first rows that have so many positions with both neighbours, or all rows."""
    place = _Places.of(block)
    ends = np.cumsum(np.bincount(place.row[place.inner], minlength=len(block)))
    rows = min(int(np.searchsorted(ends, positions)) + 1, len(block))
    return gather([(block, 0, rows)])


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the N supervised positions of a block stand."""

    position: np.ndarray
    """(N,) among all tokens."""
    row: np.ndarray
    """(N,) the row of each."""
    last: np.ndarray
    """(N,) the last token of its row."""

    @classmethod
    def of(cls, block: RowBlock) -> _Places:
        """Those of a block."""
        flags = block.lists["supervised"]
        position = np.flatnonzero(flags.values)
        row = np.searchsorted(flags.offsets, position, side="right") - 1
        return cls(position, row, flags.offsets[row + 1] - 1)

    @property
    def inner(self) -> np.ndarray:
        """(N,) bool: the token at shift 1 is of the row too."""
        return self.position + 2 <= self.last

    def token(self, shift: int, block: RowBlock) -> np.ndarray:
        """(N,) the token that the position predicts, or one so many further; the row's first or last where there is none."""
        first = block.lists["input_ids"].offsets[self.row]
        found: np.ndarray = block.lists["input_ids"].values[np.clip(self.position + 1 + shift, first, self.last)]
        return found


def _weights(block: RowBlock) -> np.ndarray:
    """(N, 3): the target weight of the tokens at shift -1, 0 and +1, where all three exist."""
    place = _Places.of(block)
    neighbours = [place.token(shift, block) for shift in (-1, 0, 1)]
    soft = unpack_soft(block)
    if isinstance(block.encoding, Full):
        wanted = torch.from_numpy(np.stack(neighbours, 1).astype(np.int64))
        dense = soft.top_logprobs.view(len(soft), -1).gather(1, wanted).exp().double().numpy()
        return np.asarray(dense[place.inner])
    goal = target(soft, served_temperature(block.encoding), tail="ignore")
    owner = owners(goal.offsets).numpy()
    ids, weights = goal.ids.numpy(), goal.weights.numpy()
    out = np.zeros((len(goal), 3))
    for column, tokens in enumerate(neighbours):
        hit = ids == tokens[owner]
        out[owner[hit], column] = weights[hit]
    return np.asarray(out[place.inner])


def _lead(differences: np.ndarray) -> float:
    """Mean over its standard error."""
    spread = float(differences.std(ddof=1)) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    mean = float(differences.mean())
    return mean / spread if spread > 0 else math.copysign(math.inf, mean) if mean else 0.0
