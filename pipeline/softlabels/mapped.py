"""Map a target over the teacher's vocabulary to a student's, at aligned positions."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.records import NO_LABEL, Target, VocabularyMap
from pipeline.softlabels.ragged import offsets_of, owners


def map_target(target: Target, positions: Tensor, mapping: VocabularyMap, *, is_sample: bool = False) -> Target:
    """Return the target of each of the student's positions, over the student's classes.

    Weights that map to the same token are added: the map is linear, so an unbiased target stays
    unbiased. The mass of tokens without a student token is dropped, or added to the bucket of other
    classes if there is one.

    Args:
        target: N positions over the teacher's V classes.
        positions: (M,) int64: the teacher's position with which each of the student's is aligned;
            -1: none, and the target has no mass.
        is_sample: whether the encoding is `sampled`. The entropy of the mapped distribution is then
            unknown, and the teacher's is used instead. It is at least as large, so KL is a lower
            bound, exact up to a constant.

    Returns:
        M positions.
    """
    counts = at_positions(target.offsets.diff(), positions, 0)
    offsets = offsets_of(counts)
    owner = owners(offsets)  # (sum K,) the student's position of each class
    place = torch.arange(len(owner)) + (at_positions(target.offsets[:-1], positions, 0) - offsets[:-1])[owner]
    first_token = torch.from_numpy(mapping.first_token)
    ids = first_token[target.ids[place]]
    weights = target.weights[place]
    lost = torch.zeros(len(positions), dtype=weights.dtype).index_add(0, owner, weights.masked_fill(ids >= 0, 0.0))
    kept = ids >= 0
    key = owner[kept] * mapping.num_classes + ids[kept]
    every, where = torch.unique(key, return_inverse=True)
    merged = torch.zeros(len(every), dtype=weights.dtype).index_add(0, where, weights[kept])
    found = torch.bincount(torch.div(every, mapping.num_classes, rounding_mode="floor"), minlength=len(positions))
    offsets = offsets_of(found)
    residual = None
    if is_sample:
        negative_entropy = at_positions(target.negative_entropy, positions, 0.0)
    else:
        terms = torch.xlogy(merged, merged)
        negative_entropy = torch.zeros(len(positions), dtype=terms.dtype).index_add(0, owners(offsets), terms)
    if target.log_residual is not None:
        rest = at_positions(target.log_residual, positions, -torch.inf).exp() + lost
        residual = rest.log()
        negative_entropy = negative_entropy + torch.xlogy(rest, rest)
    return Target(mapping.num_classes, offsets, every % mapping.num_classes, merged, residual, negative_entropy)


def at_positions(values: Tensor, positions: Tensor, otherwise: float) -> Tensor:
    """Select (M,) of (N,) values at aligned positions; `otherwise` where none is aligned."""
    if not len(values):
        return torch.full((len(positions),), otherwise, dtype=values.dtype)
    return values[positions.clamp_min(0)].masked_fill(positions < 0, otherwise)


def map_classes(classes: Tensor, positions: Tensor, mapping: VocabularyMap) -> Tensor:
    """Map (N,) classes at the teacher's positions to (M,) int64 at the student's; -100: none."""
    found = at_positions(torch.from_numpy(mapping.first_token)[classes], positions, NO_LABEL)
    return found.masked_fill(found < 0, NO_LABEL)
