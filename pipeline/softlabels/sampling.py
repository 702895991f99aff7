"""Systematic Poisson sampling, unbiased rounding, and reproducible random numbers for both."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def counter_uniforms(seed: int, split: str, source_row: int, piece: int, positions: np.ndarray) -> Tensor:
    """Return one number in [0, 1) per position, a hash of the position's place in the data.

    The numbers do not depend on the order of rows, batches or workers.

    Args:
        positions: (N,) integers, the token positions in the row.

    Returns:
        (N,) float64, uniform. The mixing function is the finaliser of SplitMix64 (Steele, Lea and
        Flood, 2014).
    """
    key = hashlib.blake2b(f"{seed}/{split}/{source_row}/{piece}".encode(), digest_size=8).digest()
    with np.errstate(over="ignore"):  # uint64 arithmetic wraps on purpose
        x = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(int.from_bytes(key, "little"))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def sample_tail(blocks: Tensor, sums: Tensor, sample_size: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Keep each class of the tail with probability pi_i = c * q_i, by systematic sampling.

    Args:
        blocks: (N, M, B) float, q_i: the tail's probabilities in blocks of B; 0 for classes in the
            top.
        sums: (N, M) float64, of each block.
        sample_size: (N,) float64, c divided by the sum of all q_i (which is 1 up to rounding). c *
            q_i is below 1 for every class of the tail.
        uniforms: (N,) float64 in [0, 1).

    Returns:
        (H,) and (H,) int64: positions, ascending, and the classes kept there, ascending within a
        position. The number of classes kept at a position is the sum of its pi_i, rounded up or
        down.

    Let C_i be the running sum of pi_i in the order of class ids. Class i is kept if the half-open
    interval (C_(i-1) - u, C_i - u] contains an integer, that is, if floor(C_i - u) exceeds
    floor(C_(i-1) - u). For u uniform in [0, 1) this has probability pi_i. The sum is in float64: in
    float32 it drifts by whole units over 100,000 classes. It is computed over blocks first, then
    only inside blocks that contain an integer. There each class gets its share of the block's sum,
    so that the rounding error does not fall on a single class.
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
    inside[:, -1:] = last  # equal to the start of the next block
    before = torch.cat([first, inside[:, :-1]], 1)
    u = uniforms[position, None]
    # rounding at the end of a block must not select classes outside the tail
    possible = blocks[position, block] > 0
    hit, offset = ((torch.floor(inside - u) > torch.floor(before - u)) & possible).nonzero(as_tuple=True)
    return position[hit], block[hit] * size + offset


def round_unbiased(values: Tensor, owner: Tensor, uniforms: Tensor) -> Tensor:
    """Round values to integers without bias, keeping the sum of each position up to rounding.

    Args:
        values: (K,) float64, not negative; the positions concatenated.
        owner: (K,) int64, the position of each value, ascending.
        uniforms: (N,) float64 in [0, 1), one per position.

    Returns:
        (K,) int64 whose expectation is `values`. The sum at each position is the sum of its values,
        rounded up or down. Each is floor(S_i - u) - floor(S_(i-1) - u), with S the running sum of a
        position: systematic rounding, like the sampling in `sample_tail`.
    """
    total = torch.cumsum(values, 0)
    start = torch.zeros(len(uniforms), dtype=torch.float64)
    start.index_add_(0, owner, values)
    start = torch.cumsum(start, 0) - start  # (N,): sum of all earlier positions
    end = total - start[owner] - uniforms[owner]
    marks = torch.floor(end)
    is_first = torch.ones_like(owner, dtype=torch.bool)
    is_first[1:] = owner[1:] != owner[:-1]
    before = torch.where(is_first, torch.floor(-uniforms)[owner], torch.roll(marks, 1))
    return (marks - before).long()
