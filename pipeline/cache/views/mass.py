"""The teacher's mass on the classes kept for certain, summarised and plotted for each split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.cache.reading.reader import Cache
from pipeline.records import Full, Sampled, Score

_BINS = 20


@dataclass(frozen=True, slots=True)
class KeptMass:
    """Kept mass over the positions of one split, at temperature 1, or the one of `sampled`."""

    positions: int
    mean: float
    histogram: tuple[int, ...]
    """Positions in each twentieth of [0, 1]; values rounded to above 1 count in the last one."""


@dataclass(frozen=True, slots=True)
class KeptMasses:
    """Contents of `reports/kept-mass.json`."""

    cache_id: str
    splits: Mapping[str, KeptMass]


def kept_masses(cache: Cache) -> KeptMasses | None:
    """Return the kept mass of every split, reading two columns.

    None for `full`, which keeps all mass, and for scores.
    """
    if isinstance(cache.manifest.contract.encoding, Full | Score):
        return None
    return KeptMasses(cache.manifest.cache_id, {split: _kept_mass(cache, split) for split in cache.splits})


def _kept_mass(cache: Cache, split: str) -> KeptMass:
    encoding = cache.manifest.contract.encoding
    name = "top_weights" if isinstance(encoding, Sampled) else "top_logprobs"
    positions, total, histogram = 0, 0.0, np.zeros(_BINS, dtype=np.int64)
    for table in cache.dataset(split).tables(["top_count", name]):
        counts, values = (table.column(i).combine_chunks().values.to_numpy(zero_copy_only=False) for i in (0, 1))
        weights = values / encoding.steps if isinstance(encoding, Sampled) else np.exp(values.astype(np.float64))
        ends = np.cumsum(counts.astype(np.int64))
        masses = np.add.reduceat(weights, ends - counts) if len(ends) else np.zeros(0)
        positions, total = positions + len(masses), total + float(masses.sum())
        histogram += np.histogram(np.clip(masses, 0, 1), bins=_BINS, range=(0, 1))[0]
    return KeptMass(positions, total / max(positions, 1), tuple(histogram.tolist()))


def draw(masses: KeptMasses, path: Path) -> bool:
    """Plot the distributions as a PNG; equal masses give equal bytes.

    Returns:
        False if matplotlib (the extra `report`) is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.add_subplot()
    edges = np.linspace(0, 1, _BINS + 1)
    for split, mass in masses.splits.items():
        share = np.asarray(mass.histogram) / max(mass.positions, 1)
        axes.stairs(share, edges, label=f"{split}: mean {mass.mean:.1%}", linewidth=1.5)
    axes.set(xlabel="the teacher's mass on the classes kept for certain", ylabel="share of positions", xlim=(0, 1))
    axes.legend(frameon=False, loc="upper left")
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    return True
