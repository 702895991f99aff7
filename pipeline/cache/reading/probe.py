"""The alignment probe: tests from the cache alone whether soft labels match their tokens."""

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

    A position predicts the token after it, so the soft labels should have large weights there: at
    shift 0. Classes that were not kept have weight 0. The mean is linear in the weights, so it is
    unbiased for a sampled target.

    Returns:
        The mean weights and a verdict, or None if the classes are not tokens. `aligned`: shift 0
        exceeds both neighbours by more than 4 paired standard errors. `misaligned`: a neighbour
        exceeds shift 0 by as much, over at least 1,000 positions, and the mean at shift 0 exceeds
        3/V. `inconclusive`: otherwise (a random model with tied embeddings predicts its own input
        best).
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
    """Return the first shards, as many as the probe reads."""
    found: list[Shard] = []
    for shard in shards:
        if sum(other.positions for other in found) >= _POSITIONS:
            break
        found.append(shard)
    return tuple(found)


def _until(block: RowBlock, positions: int) -> RowBlock:
    """Return the first rows with enough positions that have both neighbours, or all rows."""
    place = _Places.of(block)
    ends = np.cumsum(np.bincount(place.row[place.inner], minlength=len(block)))
    rows = min(int(np.searchsorted(ends, positions)) + 1, len(block))
    return gather([(block, 0, rows)])


@dataclass(frozen=True, slots=True)
class _Places:
    """The places of the N supervised positions of a block among its tokens."""

    position: np.ndarray
    """(N,) index among all tokens of the block."""
    row: np.ndarray
    """(N,) row of each position."""
    last: np.ndarray
    """(N,) index of the last token of the position's row."""

    @classmethod
    def of(cls, block: RowBlock) -> _Places:
        """Find the supervised positions of a block."""
        flags = block.lists["supervised"]
        position = np.flatnonzero(flags.values)
        row = np.searchsorted(flags.offsets, position, side="right") - 1
        return cls(position, row, flags.offsets[row + 1] - 1)

    @property
    def inner(self) -> np.ndarray:
        """(N,) bool: whether the token at shift 1 is in the same row."""
        return self.position + 2 <= self.last

    def token(self, shift: int, block: RowBlock) -> np.ndarray:
        """Return (N,) token ids: the token that each position predicts, moved by `shift`.

        Beyond the ends of the row, it is the row's first or last token.
        """
        first = block.lists["input_ids"].offsets[self.row]
        found: np.ndarray = block.lists["input_ids"].values[np.clip(self.position + 1 + shift, first, self.last)]
        return found


def _weights(block: RowBlock) -> np.ndarray:
    """Return (N, 3) target weights of the tokens at shift -1, 0 and +1, for rows with all three."""
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
    """Return the mean divided by its standard error."""
    spread = float(differences.std(ddof=1)) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    mean = float(differences.mean())
    return mean / spread if spread > 0 else math.copysign(math.inf, mean) if mean else 0.0
