"""Slicing and concatenating soft labels."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pipeline.records import Full, Sampled, TopK, TopP
from pipeline.softlabels import concatenate, encode, rows, split_rows


@pytest.mark.parametrize("encoding", [Full(), TopK(3), TopP(0.8), Sampled(5.0)], ids=lambda e: e.kind)
@pytest.mark.parametrize("counts", [[1] * 12, [12], [5, 1, 6], [3, 0, 9]])
def test_runs_of_positions_are_the_slices_and_join_to_the_whole(encoding, counts):
    generator = torch.Generator().manual_seed(3)
    soft = encode(3 * torch.randn(12, 17, generator=generator), encoding, generator=generator)
    parts, start = split_rows(soft, counts), 0
    for part, count in zip(parts, counts, strict=True):
        _same(part, rows(soft, start, start + count))
        start += count
    _same(concatenate(parts), soft)


def _same(one, other):
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
