"""Mean and standard deviation of the teacher's scores for each output, pooled over row groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from pipeline.records import Manifest, Moments, Scale


def moments_of(table: pa.Table) -> tuple[Moments, ...]:
    """Return the moments of each output of a row group; empty for a cache without scores."""
    if "teacher_scores" not in table.column_names or not table.num_rows:
        return ()
    values = np.concatenate([chunk.flatten().to_numpy() for chunk in table.column("teacher_scores").chunks])
    by_output = values.astype(np.float64).reshape(table.num_rows, -1).T
    return tuple(
        Moments(len(each), float(each.mean()), float(np.square(each - each.mean()).sum())) for each in by_output
    )


def pooled(parts: Iterable[Sequence[Moments]]) -> tuple[Moments, ...]:
    """Combine the moments of several parts (Chan, Golub and LeVeque, 1983)."""
    return tuple(_joined(each) for each in zip(*(part for part in parts if part), strict=True))


def scale_of(manifest: Manifest) -> Scale | None:
    """Return the scale of the teacher's scores in `train`, or in all rows if there is no `train`.

    None: the cache holds distributions.
    """
    found = pooled(shard.moments for shard in manifest.split_shards("train") or manifest.shards)
    if not found:
        return None
    deviations = [math.sqrt(each.deviation / (each.count - 1)) if each.count > 1 else 0.0 for each in found]
    return Scale(
        np.array([each.mean for each in found], dtype=np.float32),
        np.array([value or 1.0 for value in deviations], dtype=np.float32),
    )


def _joined(parts: Sequence[Moments]) -> Moments:
    count = sum(part.count for part in parts)
    mean = sum(part.count * part.mean for part in parts) / count
    deviation = sum(part.deviation + part.count * (part.mean - mean) ** 2 for part in parts)
    return Moments(count, mean, deviation)
