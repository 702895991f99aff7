"""Slices and joins of SoftLabels: positions are rows, and each owns a run of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pipeline.records import Encoding, Full, Score, SoftLabels


def offsets_of(counts: Tensor) -> Tensor:
    """(N,) counts -> (N + 1,) offsets, int64."""
    offsets = torch.zeros(counts.numel() + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


def owners(offsets: Tensor) -> Tensor:
    """(N + 1,) offsets -> (sum K,) the position that owns each class, int64."""
    if offsets.device.type == "cpu":  # NumPy's takes one thread: beside training there is often no other
        counts = np.diff(offsets.numpy())
        return torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    return torch.repeat_interleave(torch.arange(offsets.numel() - 1, device=offsets.device), offsets.diff())


def segment_logsumexp(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """(sum K,) values -> (N,) log-sum-exp of each position's own."""
    peak = torch.full((count,), -torch.inf, dtype=values.dtype, device=values.device).scatter_reduce(
        0, owner, values, "amax"
    )
    total = torch.zeros(count, dtype=values.dtype, device=values.device).scatter_add(
        0, owner, (values - peak[owner]).exp()
    )
    return peak + total.log()


def empty(encoding: Encoding, num_classes: int) -> SoftLabels:
    """Soft labels of no position."""
    none = torch.zeros(0, dtype=torch.int64)
    start = torch.zeros(1, dtype=torch.int64)
    grid = len(getattr(encoding, "temperatures", ()))
    return SoftLabels(encoding, num_classes, start, none, torch.zeros(0), start, none, torch.zeros(0, grid))


def rows(soft: SoftLabels, start: int, stop: int) -> SoftLabels:
    """Positions `[start, stop)`; a view wherever tensors allow."""
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
    """Runs of so many positions each, one after another, on the CPU; views wherever tensors allow."""
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
    """(N + 1,) offsets of all -> those of each run, from 0, and the classes of each run."""
    each = np.asarray(counts, dtype=np.int64)
    edges = offsets[np.concatenate([[0], np.cumsum(each)])]
    run = np.repeat(np.arange(len(each)), each + 1)
    inner = offsets[np.arange(len(run)) - run] - edges[run]  # each run has one offset more than positions
    return torch.split(torch.from_numpy(inner), (each + 1).tolist()), np.diff(edges).tolist()


def concatenate(parts: Sequence[SoftLabels]) -> SoftLabels:
    """Positions of all parts, one after another.

    The parts share encoding and V; there is at least one.
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
    """Offsets of several runs, each from 0 -> those of all, one after another."""
    if parts[0].device.type != "cpu":
        return offsets_of(torch.cat([part.diff() for part in parts]))
    arrays = [part.numpy() for part in parts]
    before = np.cumsum([0, *(int(array[-1]) for array in arrays)])[:-1]
    inner = np.concatenate([array[1:] for array in arrays]) + np.repeat(before, [len(array) - 1 for array in arrays])
    return torch.from_numpy(np.concatenate([np.zeros(1, dtype=np.int64), inner]))


def most_likely(soft: SoftLabels) -> tuple[Tensor, Tensor]:
    """(N,) int64 and (N,) nats: the teacher's most likely class, always among the kept, and its log-probability as it is stored (`sampled`: rounded).

    Of scores (N,) float32, the scores, and nan.
    """
    if isinstance(soft.encoding, Score):
        return soft.top_logprobs, torch.full((len(soft),), torch.nan)
    if isinstance(soft.encoding, Full):
        logprobs, ids = soft.top_logprobs.reshape(len(soft), soft.num_classes).max(-1)
        return ids, logprobs
    first = soft.top_offsets[:-1]  # by falling probability, before any rounding
    return soft.top_ids[first], soft.top_logprobs[first]
