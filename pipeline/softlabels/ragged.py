"""Slices and joins of SoftLabels: positions are rows, and each owns a run of classes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.records import Encoding, SoftLabels


def offsets_of(counts: Tensor) -> Tensor:
    """(N,) counts -> (N + 1,) offsets, int64."""
    offsets = torch.zeros(counts.numel() + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


def owners(offsets: Tensor) -> Tensor:
    """(N + 1,) offsets -> (sum K,) the position that owns each class, int64."""
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
    """Runs of so many positions each, one after another; views wherever tensors allow."""
    edges = list(itertools.accumulate(counts, initial=0))
    at = torch.tensor(edges)
    tops, tails = soft.top_offsets[at], soft.tail_offsets[at]
    parts = zip(
        itertools.pairwise(edges),
        tops.tolist(),
        torch.split(soft.top_ids, tops.diff().tolist()),
        torch.split(soft.top_logprobs, tops.diff().tolist()),
        tails.tolist(),
        torch.split(soft.tail_ids, tails.diff().tolist()),
        torch.split(soft.log_residuals, list(counts)),
        strict=False,  # a list of edges is one longer
    )
    return [
        SoftLabels(
            soft.encoding,
            soft.num_classes,
            soft.top_offsets[start : stop + 1] - top,
            ids,
            logprobs,
            soft.tail_offsets[start : stop + 1] - tail,
            tail_ids,
            residuals,
        )
        for (start, stop), top, ids, logprobs, tail, tail_ids, residuals in parts
    ]


def concatenate(parts: Sequence[SoftLabels]) -> SoftLabels:
    """Positions of all parts, one after another. The parts share encoding and V; there is at least one."""
    return replace(
        parts[0],
        top_offsets=offsets_of(torch.cat([part.top_offsets.diff() for part in parts])),
        top_ids=torch.cat([part.top_ids for part in parts]),
        top_logprobs=torch.cat([part.top_logprobs for part in parts]),
        tail_offsets=offsets_of(torch.cat([part.tail_offsets.diff() for part in parts])),
        tail_ids=torch.cat([part.tail_ids for part in parts]),
        log_residuals=torch.cat([part.log_residuals for part in parts]),
    )
