from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest

from pipeline.cache.format.moments import moments_of, pooled
from pipeline.records import Moments


def table(values: np.ndarray) -> pa.Table:
    lists = pa.array(values.astype(np.float32).tolist(), type=pa.list_(pa.float32()))
    return pa.table({"teacher_scores": lists})


@pytest.mark.parametrize("cuts", [(), (1,), (3, 50), tuple(range(1, 99))])
def test_moments_of_parts_are_those_of_all(cuts):
    """Includes a mean far from 0, where sums of squares would lose the variance to rounding."""
    rng = np.random.default_rng(0)
    values = np.stack([1e6 + rng.normal(size=99), 0.01 * rng.normal(size=99)], 1).astype(np.float32)
    edges = [0, *cuts, 99]
    parts = [moments_of(table(values[a:b])) for a, b in itertools.pairwise(edges)]
    found = pooled(parts)
    for each, column in zip(found, values.T.astype(np.float64), strict=True):
        assert each.count == 99
        assert each.mean == pytest.approx(column.mean(), rel=1e-12)
        assert each.deviation == pytest.approx(np.square(column - column.mean()).sum(), rel=1e-9)


def test_a_part_without_rows_adds_nothing():
    some = (Moments(2, 1.0, 0.5),)
    assert pooled([(), some, ()]) == some
    assert pooled([]) == ()
    assert moments_of(pa.table({"source_row": [1]})) == ()
