"""Systematic Poisson sampling of a distribution's tail, and the counter hash that seeds it."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

#: Positions at a time: the float64 running sum over V = 50,000 classes then stays inside a CPU's cache.
_CHUNK = 16


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


def sample_tail(tail: Tensor, uniforms: Tensor, *, sample_size: float) -> Tensor:
    """Keep each class of the tail with probability c * q_i, by systematic sampling.

    Args:
        tail: (N, V) float64, the probabilities; 0 for the classes that are in the top.
        uniforms: (N,) float64 in [0, 1).
        sample_size: c; every probability in the tail is below 1/c.

    Returns:
        (N, V) bool. E[kept_i] = c * q_i exactly, and the number kept is the sum of c * q_i rounded up or down.

    With C_i the running sum of pi_i = c * q_i in id order, class i is kept when the half-open interval
    (C_(i-1) - u, C_i - u] holds an integer: when floor(C_i - u) differs from floor(C_(i-1) - u). As u runs over [0, 1) that happens on
    a set of length pi_i. The sum is in float64: in float32 it drifts by whole units over 100,000 classes.
    """
    kept = torch.empty(tail.shape, dtype=torch.bool)
    for start in range(0, tail.shape[0], _CHUNK):
        part = slice(start, start + _CHUNK)
        steps = torch.floor(torch.cumsum(tail[part] * sample_size, 1) - uniforms[part, None])
        kept[part, 1:] = steps[:, 1:] != steps[:, :-1]
        kept[part, 0] = steps[:, 0] != torch.floor(-uniforms[part])
    # A probability of 0 leaves the running sum as it was, so it is never kept.
    return kept
