"""Slice and concatenate SoftLabels, whose positions each have a varying number of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pipeline.records import Encoding, Full, Score, SoftLabels


def offsets_of(counts: Tensor) -> Tensor:
    """Convert (N,) counts to (N + 1,) int64 offsets."""
    offsets = torch.zeros(counts.numel() + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


def owners(offsets: Tensor) -> Tensor:
    """Convert (N + 1,) offsets to the (sum K,) int64 position of each class."""
    if offsets.device.type == "cpu":  # NumPy uses one thread; others are often busy with training
        counts = np.diff(offsets.numpy())
        return torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    return torch.repeat_interleave(torch.arange(offsets.numel() - 1, device=offsets.device), offsets.diff())


def segment_logsumexp(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """Return the (N,) log-sum-exp of the (sum K,) values of each position."""
    peak = torch.full((count,), -torch.inf, dtype=values.dtype, device=values.device).scatter_reduce(
        0, owner, values, "amax"
    )
    total = torch.zeros(count, dtype=values.dtype, device=values.device).scatter_add(
        0, owner, (values - peak[owner]).exp()
    )
    return peak + total.log()


def empty(encoding: Encoding, num_classes: int) -> SoftLabels:
    """Return soft labels without positions."""
    none = torch.zeros(0, dtype=torch.int64)
    start = torch.zeros(1, dtype=torch.int64)
    grid = len(getattr(encoding, "temperatures", ()))
    return SoftLabels(encoding, num_classes, start, none, torch.zeros(0), start, none, torch.zeros(0, grid))


def rows(soft: SoftLabels, start: int, stop: int) -> SoftLabels:
    """Return the positions `[start, stop)`, as views where possible."""
    top, tail = soft.top_offsets[start : stop + 1], soft.tail_offsets[start : stop + 1]
    return replace(
        soft,
        top_offsets=top - top[0],
        top_ids=soft.top_ids[top[0] : top[-1]],
        top_logprobs=soft.top_logprobs[top[0] : top[-1]],
        tail_offsets=tail - tail[0],
        tail_ids=soft.tail_ids[tail[0] : tail[-1]],
        log_residuals=soft.log_residuals[start:stop],
    )


def split_rows(soft: SoftLabels, counts: Sequence[int]) -> list[SoftLabels]:
    """Split soft labels on the CPU into consecutive runs of `counts` positions, mostly views."""
    top_offsets, tops = _split_offsets(soft.top_offsets.numpy(), counts)
    tail_offsets, tails = _split_offsets(soft.tail_offsets.numpy(), counts)
    parts = zip(
        top_offsets,
        torch.split(soft.top_ids, tops),
        torch.split(soft.top_logprobs, tops),
        tail_offsets,
        torch.split(soft.tail_ids, tails),
        torch.split(soft.log_residuals, list(counts)),
        strict=True,
    )
    return [SoftLabels(soft.encoding, soft.num_classes, *part) for part in parts]


def _split_offsets(offsets: np.ndarray, counts: Sequence[int]) -> tuple[Sequence[Tensor], list[int]]:
    """Split (N + 1,) offsets into those of each run, from 0, and count the classes of each run."""
    each = np.asarray(counts, dtype=np.int64)
    edges = offsets[np.concatenate([[0], np.cumsum(each)])]
    run = np.repeat(np.arange(len(each)), each + 1)
    # each run has one more offset than positions
    inner = offsets[np.arange(len(run)) - run] - edges[run]
    return torch.split(torch.from_numpy(inner), (each + 1).tolist()), np.diff(edges).tolist()


def concatenate(parts: Sequence[SoftLabels]) -> SoftLabels:
    """Concatenate the positions of all parts.

    There is at least one part, and all have the same encoding and number of classes V.
    """
    return replace(
        parts[0],
        top_offsets=_joined([part.top_offsets for part in parts]),
        top_ids=torch.cat([part.top_ids for part in parts]),
        top_logprobs=torch.cat([part.top_logprobs for part in parts]),
        tail_offsets=_joined([part.tail_offsets for part in parts]),
        tail_ids=torch.cat([part.tail_ids for part in parts]),
        log_residuals=torch.cat([part.log_residuals for part in parts]),
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate the offsets of several runs, each from 0."""
    if parts[0].device.type != "cpu":
        return offsets_of(torch.cat([part.diff() for part in parts]))
    arrays = [part.numpy() for part in parts]
    before = np.cumsum([0, *(int(array[-1]) for array in arrays)])[:-1]
    inner = np.concatenate([array[1:] for array in arrays]) + np.repeat(before, [len(array) - 1 for array in arrays])
    return torch.from_numpy(np.concatenate([np.zeros(1, dtype=np.int64), inner]))


def most_likely(soft: SoftLabels) -> tuple[Tensor, Tensor]:
    """Return the teacher's most likely class at each position, and its stored log-probability.

    Returns:
        (N,) int64 class ids, and (N,) nats (`sampled`: rounded). The most likely class is always
        kept. For scores: (N,) float32 scores, and nan.
    """
    if isinstance(soft.encoding, Score):
        return soft.top_logprobs, torch.full((len(soft),), torch.nan)
    if isinstance(soft.encoding, Full):
        logprobs, ids = soft.top_logprobs.reshape(len(soft), soft.num_classes).max(-1)
        return ids, logprobs
    first = soft.top_offsets[:-1]  # classes are sorted by probability before rounding
    return soft.top_ids[first], soft.top_logprobs[first]
