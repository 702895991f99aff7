"""Histograms as numbers that a template draws in SVG: no library in the page, and light and dark come from its own colours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: The drawing's own units.
WIDTH, HEIGHT = 320, 110
_BINS, _FEWEST = 24, 8


@dataclass(frozen=True, slots=True)
class Bar:
    """One bin."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True, slots=True)
class Chart:
    """One histogram, and the few numbers that say the same."""

    title: str
    caption: str
    bars: tuple[Bar, ...]
    low: str
    high: str
    summary: str


def histogram(
    title: str,
    values: np.ndarray,
    caption: str,
    *,
    low: float | None = None,
    high: float | None = None,
    whole: bool = False,
    percent: bool = False,
) -> Chart | None:
    """Count values in at most 24 bins.

    Args:
        values: (N,) numbers; those that are not finite are not known, and left out.
        low, high: the range; default: that of the values.
        whole: values are counts, and bins hold whole numbers of them.

    Returns:
        None where no value is known.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    if not len(known):
        return None
    start = float(known.min()) if low is None else min(low, float(known.min()))
    stop = float(known.max()) if high is None else max(high, float(known.max()))
    if whole:
        step = max(1, -(-int(stop - start + 1) // _BINS))
        edges = np.arange(start, max(stop, start + _FEWEST - 1) + 1 + step, step)
    else:
        edges = np.linspace(start, stop if stop > start else start + 1.0, _BINS + 1)
    counts, edges = np.histogram(known, edges)

    def text(value: float) -> str:
        return f"{value:.0%}" if percent else f"{value:,.0f}" if whole else f"{value:.2f}"

    def span(i: int) -> str:
        last = edges[i + 1] - 1 if whole else edges[i + 1]
        return text(edges[i]) if whole and last <= edges[i] else f"{text(edges[i])} to {text(last)}"

    unit = WIDTH / len(counts)
    bars = [
        Bar(
            x=round(i * unit + 0.75, 2),
            y=round(HEIGHT * (1 - count / counts.max()), 2),
            width=round(unit - 1.5, 2),
            height=round(HEIGHT * count / counts.max(), 2),
            title=f"{span(i)}: {count / len(known):.1%}",
        )
        for i, count in enumerate(counts.tolist())
        if count
    ]
    middle = np.quantile(known, [0.1, 0.5, 0.9])

    def fine(value: float) -> str:
        return f"{value:.1%}" if percent else f"{value:,.1f}" if whole else f"{value:.2f}"

    summary = (
        f"mean {fine(float(known.mean()))} · median {fine(middle[1])} · 80% in {fine(middle[0])} to {fine(middle[2])}"
    )
    last = float(edges[-1]) - 1 if whole else float(edges[-1])
    return Chart(title, caption, tuple(bars), text(float(edges[0])), text(last), summary)
