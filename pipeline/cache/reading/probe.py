"""The alignment probe: is a cache in step with its tokens? From the cache alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from pipeline.records import AlignmentProbe, CachedExample, Full, Shard
from pipeline.softlabels import served_temperature, target

_POSITIONS = 20_000
_STANDARD_ERRORS = 4.0
_ENOUGH = 1000


def probe_alignment(rows: Iterable[CachedExample]) -> AlignmentProbe | None:
    """Compare the mean target weight of the hard label with that of its neighbours.

    A position predicts the token after it, so the weights of the soft labels should be large there: shift 0. Weights of classes that were not
    kept count as 0; the mean is linear in the weights, so it is unbiased for a sampled target.

    Returns:
        Misaligned: a neighbour wins by more than 4 paired standard errors over at least 1,000 positions, where shift 0's mean exceeds
        3/V. Inconclusive: neither wins (a random model with tied embeddings predicts its own input best). None: no token classes.
    """
    columns: list[np.ndarray] = []
    seen = 0
    num_classes = 1
    for row in rows:
        if row.example.supervised is None:
            return None
        num_classes = row.soft.num_classes
        columns.append(_weights(row))
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


def _weights(row: CachedExample) -> np.ndarray:
    """(N, 3): the target weight of the tokens at shift -1, 0 and +1, where all three exist."""
    assert row.example.supervised is not None
    positions = np.flatnonzero(row.example.supervised)
    tokens = row.example.input_ids
    neighbours = [np.clip(positions + 1 + shift, 0, len(tokens) - 1) for shift in (-1, 0, 1)]
    if isinstance(row.soft.encoding, Full):
        wanted = torch.from_numpy(np.stack([tokens[index] for index in neighbours], 1).astype(np.int64))
        dense = row.soft.top_logprobs.view(len(row.soft), -1).gather(1, wanted).exp().double().numpy()
        return np.asarray(dense[positions + 2 < len(tokens)])
    goal = target(row.soft, served_temperature(row.soft.encoding), tail="ignore")
    owner = np.repeat(np.arange(len(goal)), goal.offsets.diff().numpy())
    ids, weights = goal.ids.numpy(), goal.weights.numpy()
    out = np.zeros((len(positions), 3))
    for column, index in enumerate(neighbours):
        hit = ids == tokens[index][owner]
        out[owner[hit], column] = weights[hit]
    return out[positions + 2 < len(tokens)]


def _lead(differences: np.ndarray) -> float:
    """Mean over its standard error."""
    spread = float(differences.std(ddof=1)) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    mean = float(differences.mean())
    return mean / spread if spread > 0 else math.copysign(math.inf, mean) if mean else 0.0
