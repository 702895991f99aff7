"""Systematic Poisson sampling of a distribution's tail, unbiased rounding of its top, and the counter hash that seeds both."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def counter_uniforms(seed: int, split: str, source_row: int, piece: int, positions: np.ndarray) -> Tensor:
    """One number in [0, 1) per position: a hash of where it stands, so it depends on no order, batch or worker.

    Args:
        positions: (N,) integers, the token positions in the row.

    Returns:
        (N,) float64, uniform. The mixing function is the finaliser of SplitMix64 (Steele, Lea and
            Flood, 2014).
    """
    key = hashlib.blake2b(f"{seed}/{split}/{source_row}/{piece}".encode(), digest_size=8).digest()
    with np.errstate(over="ignore"):  # uint64 arithmetic is meant to wrap
        x = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(int.from_bytes(key, "little"))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def sample_tail(blocks: Tensor, sums: Tensor, sample_size: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Keep each class of the tail with probability pi_i = c * q_i, by systematic sampling.

    Args:
        blocks: (N, M, B) float, q_i: the tail's probabilities in blocks of B; 0 for the classes
            that are in the top.
        sums: (N, M) float64, of each block.
        sample_size: (N,) float64, c over the sum of all q_i, which is 1 but for rounding; every c *
            q_i in the tail is below 1.
        uniforms: (N,) float64 in [0, 1).

    Returns:
        (H,) and (H,) int64: positions, rising, and the classes kept there, rising within a
            position. The number kept at a position is the sum of
        its pi_i rounded up or down.

    With C_i the running sum of pi_i in id order, class i is kept when the half-open interval
    (C_(i-1) - u, C_i - u] holds an integer: when floor(C_i - u) exceeds floor(C_(i-1) - u). As u
    runs over [0, 1) that happens on a set of length pi_i. The sum is in float64: in float32 it
    drifts by whole units over 100,000 classes. It is taken over blocks first, and inside those only
    that an integer falls in; there each class has its share of the block's sum, so that the
    rounding of the sum falls on no single one.
    """
    size = blocks.shape[-1]
    ends = torch.cumsum(sums * sample_size[:, None], 1)  # (N, M)
    u = uniforms[:, None]
    marks = torch.floor(ends - u)
    crossed = torch.diff(marks, dim=1, prepend=torch.floor(-u)) > 0
    position, block = crossed.nonzero(as_tuple=True)  # (H',): the blocks hit
    last = ends[position, block, None]
    first = torch.where(block[:, None] > 0, ends[position, (block - 1).clamp_min(0), None], 0.0)
    inside = torch.cumsum(blocks[position, block].double(), 1)  # (H', B)
    inside = first + inside * ((last - first) / inside[:, -1:])
    inside[:, -1:] = last  # the block's end as its neighbour sees it
    before = torch.cat([first, inside[:, :-1]], 1)
    u = uniforms[position, None]
    possible = blocks[position, block] > 0  # rounding at a block's end could else hit a class that is not in the tail
    hit, offset = ((torch.floor(inside - u) > torch.floor(before - u)) & possible).nonzero(as_tuple=True)
    return position[hit], block[hit] * size + offset


def round_unbiased(values: Tensor, owner: Tensor, uniforms: Tensor) -> Tensor:
    """Whole numbers whose expectation is `values`, and whose sum at each position is the sum of its values rounded up or down.

    Args:
        values: (K,) float64, not negative; the positions one after another.
        owner: (K,) int64, the position of each, rising.
        uniforms: (N,) float64 in [0, 1), one a position.

    Returns:
        (K,) int64: floor(S_i - u) - floor(S_(i-1) - u) with S the running sum of a position:
            systematic rounding, as `sample_tail` keeps.
    """
    total = torch.cumsum(values, 0)
    start = torch.zeros(len(uniforms), dtype=torch.float64)
    start.index_add_(0, owner, values)
    start = torch.cumsum(start, 0) - start  # (N,): the sum of all positions before
    end = total - start[owner] - uniforms[owner]
    marks = torch.floor(end)
    is_first = torch.ones_like(owner, dtype=torch.bool)
    is_first[1:] = owner[1:] != owner[:-1]
    before = torch.where(is_first, torch.floor(-uniforms)[owner], torch.roll(marks, 1))
    return (marks - before).long()
