"""Systematic Poisson sampling of a distribution's tail, and the counter hash that seeds it."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

#: Classes whose probabilities are summed at once: only the blocks that are hit are looked into.
_BLOCK = 64


def counter_uniforms(seed: int, split: str, source_row: int, piece: int, positions: np.ndarray) -> Tensor:
    """One number in [0, 1) per position: a hash of where it stands, so it depends on no order, batch or worker.

    Args:
        positions: (N,) integers, the token positions in the row.

    Returns:
        (N,) float64, uniform. The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    key = hashlib.blake2b(f"{seed}/{split}/{source_row}/{piece}".encode(), digest_size=8).digest()
    with np.errstate(over="ignore"):  # uint64 arithmetic is meant to wrap
        x = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(int.from_bytes(key, "little"))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def sample_tail(tail: Tensor, uniforms: Tensor, *, sample_size: float) -> tuple[Tensor, Tensor]:
    """Keep each class of the tail with probability c * q_i, by systematic sampling.

    Args:
        tail: (N, V) float, the probabilities; 0 for the classes that are in the top.
        uniforms: (N,) float64 in [0, 1).
        sample_size: c; every probability in the tail is below 1/c.

    Returns:
        (M,) and (M,) int64: positions, rising, and the classes kept there, rising within a position. Class i is kept with probability
        c * q_i exactly, and the number kept is the sum of c * q_i rounded up or down.

    With C_i the running sum of pi_i = c * q_i in id order, class i is kept when the half-open interval (C_(i-1) - u, C_i - u] holds an
    integer: when floor(C_i - u) exceeds floor(C_(i-1) - u). As u runs over [0, 1) that happens on a set of length pi_i. The sum is in float64: in
    float32 it drifts by whole units over 100,000 classes. It is taken over blocks first, and inside those only that an integer falls in.
    """
    count, num_classes = tail.shape
    padded = torch.nn.functional.pad(tail, (0, -num_classes % _BLOCK)) if num_classes % _BLOCK else tail
    blocks = padded.view(count, -1, _BLOCK)  # (N, V / block, block)
    ends = torch.cumsum(blocks.sum(-1, dtype=torch.float64) * sample_size, 1)  # (N, V / block)
    starts = torch.nn.functional.pad(ends, (1, 0))[:, :-1]
    u = uniforms[:, None]
    position, block = (torch.floor(ends - u) > torch.floor(starts - u)).nonzero(as_tuple=True)  # (H,): the blocks hit
    first, last = starts[position, block, None], ends[position, block, None]
    inside = first + torch.cumsum(blocks[position, block].double() * sample_size, 1)  # (H, block)
    inside[:, -1:] = last  # the block's end as its neighbour sees it, whatever the rounding of the two sums
    before = torch.cat([first, inside[:, :-1]], 1)
    u = uniforms[position, None]
    possible = blocks[position, block] > 0  # rounding at a block's end could else hit a class that is not in the tail
    hit, offset = ((torch.floor(inside - u) > torch.floor(before - u)) & possible).nonzero(as_tuple=True)
    return position[hit], block[hit] * _BLOCK + offset
