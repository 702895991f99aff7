"""Compute bar charts as coordinates that a template draws in SVG, without a plotting library.

Colours come from the page's style sheet, which has a light and a dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

#: Size of the drawing, and edges of the bars' area, in SVG units.
WIDTH, HEIGHT = 320, 154
TOP, BOTTOM, RIGHT = 23, 118, 314
#: Approximate width of a character, in SVG units.
_LETTER = 6.2
_BINS, _FEWEST = 24, 8


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a chart."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True, slots=True)
class Label:
    """A text at a point of an axis."""

    at: float
    text: str
    anchor: str = "middle"


@dataclass(frozen=True, slots=True)
class Chart:
    """A bar chart, with a text that summarises its values."""

    title: str
    caption: str
    left: float
    """Left edge of the bars' area."""
    bars: tuple[Bar, ...]
    x_labels: tuple[Label, ...]
    y_labels: tuple[Label, ...]
    x_title: str
    y_title: str
    summary: str
    mark: Label | None = None
    """A reference value on the x axis."""


@dataclass(frozen=True, slots=True)
class Axis:
    """The x axis of a histogram."""

    title: str
    low: float | None = None
    high: float | None = None
    """End of the range; None for `low` or `high`: from the values."""
    whole: bool = False
    """Values are integers; bins hold whole numbers of them."""
    percent: bool = False
    mark: tuple[float, str] | None = None
    """A reference value inside the range, and its description."""

    def text(self, value: float) -> str:
        """Return a value as the axis shows it."""
        return f"{value:.0%}" if self.percent else f"{value:,.0f}" if self.whole else f"{value:.2f}"


def histogram(title: str, values: np.ndarray, caption: str, *, axis: Axis, of: str) -> Chart | None:
    """Return a histogram with at most 24 bins, or None if no value is finite.

    Args:
        values: (N,) numbers. Values that are not finite count as unknown: they are left out, and
            their number is in the summary.
        of: what is counted, the title of the y axis.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    if not len(known):
        return None
    start = float(known.min()) if axis.low is None else min(axis.low, float(known.min()))
    stop = float(known.max()) if axis.high is None else max(axis.high, float(known.max()))
    if axis.whole:
        step = max(1, -(-int(stop - start + 1) // _BINS))
        edges = np.arange(start, max(stop, start + _FEWEST - 1) + 1 + step, step)
    else:
        edges = np.linspace(start, stop if stop > start else start + 1.0, _BINS + 1)
    counts, edges = np.histogram(known, edges)

    def span(i: int) -> str:
        last = edges[i + 1] - 1 if axis.whole else edges[i + 1]
        one = axis.whole and last <= edges[i]
        return axis.text(edges[i]) if one else f"{axis.text(edges[i])} to {axis.text(last)}"

    low, high = float(edges[0]), float(edges[-1])
    left, y_labels, scale = _counts_axis(int(counts.max()))

    def across(value: float) -> float:
        return left + (RIGHT - left) * (value - low) / (high - low)

    # centre the tick below its bar
    middle = 0.5 if axis.whole and edges[1] - edges[0] == 1 else 0.0
    # a tick for each integer if there are few
    most = _FEWEST if axis.whole and high - low <= _FEWEST else 5
    ticks = _nice(low, high - 1 if axis.whole else high, most, whole=axis.whole)
    return Chart(
        title,
        caption,
        left,
        _bars(counts.tolist(), left, scale, span),
        tuple(_inside(across(tick + middle), _tick_text(axis, tick, ticks)) for tick in ticks),
        y_labels,
        axis.title,
        of,
        _summary(known, len(np.asarray(values)) - len(known), axis),
        axis.mark and _inside(across(axis.mark[0]), axis.mark[1]),
    )


def bars(title: str, groups: Sequence[tuple[str, int]], caption: str, *, x_title: str, of: str) -> Chart:
    """Return a chart with a bar for each named count."""
    counts = [count for _, count in groups]
    left, y_labels, scale = _counts_axis(max(counts))
    unit = (RIGHT - left) / len(counts)
    total = max(sum(counts), 1)
    return Chart(
        title,
        caption,
        left,
        _bars(counts, left, scale, lambda i: groups[i][0]),
        tuple(_inside(left + unit * (i + 0.5), name) for i, (name, _) in enumerate(groups)),
        y_labels,
        x_title,
        of,
        " · ".join(f"{name}: {count / total:.1%}" for name, count in groups),
    )


def _bars(counts: Sequence[int], left: float, scale: float, name: Callable[[int], str]) -> tuple[Bar, ...]:
    unit = (RIGHT - left) / len(counts)
    total = max(sum(counts), 1)
    return tuple(
        Bar(
            x=round(left + i * unit + 0.6, 2),
            y=round(BOTTOM - scale * count, 2),
            width=round(unit - 1.2, 2),
            height=round(scale * count, 2),
            title=f"{name(i)}: {count:,} ({count / total:.1%})",
        )
        for i, count in enumerate(counts)
        if count
    )


def _counts_axis(most: int) -> tuple[float, tuple[Label, ...], float]:
    """Return the left edge of the bars' area, the labels of the y axis, and SVG units per count."""
    ticks = _nice(0, most, 3, whole=True)
    end = max(most, ticks[-1], 1)
    scale = (BOTTOM - TOP) / end
    labels = tuple(Label(round(BOTTOM - scale * tick, 2), f"{tick:,.0f}", "end") for tick in ticks)
    return round(6 + _LETTER * max(len(label.text) for label in labels), 2), labels, scale


def _nice(low: float, high: float, most: int, *, whole: bool) -> list[float]:
    """Return ticks in a range, at most `most` steps of 1, 2 or 5 times a power of ten."""
    width = max(high - low, 1 if whole else 1e-9)
    power = 10.0 ** math.floor(math.log10(width / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * most >= width * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick_text(axis: Axis, tick: float, ticks: Sequence[float]) -> str:
    if axis.percent or axis.whole:
        return axis.text(tick)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    return f"{tick:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _inside(at: float, text: str) -> Label:
    """Return a label centred at a point, or aligned to stay inside the drawing."""
    half = _LETTER * len(text) / 2
    return Label(round(at, 2), text, "start" if at < half else "end" if at + half > WIDTH else "middle")


def _summary(known: np.ndarray, unknown: int, axis: Axis) -> str:
    def fine(value: float) -> str:
        return f"{value:.1%}" if axis.percent else f"{value:,.1f}" if axis.whole else f"{value:.2f}"

    low, middle, high = np.quantile(known, [0.1, 0.5, 0.9])
    text = f"mean {fine(float(known.mean()))} · median {fine(middle)} · 80% in {fine(low)} to {fine(high)}"
    return text + (f" · {unknown:,} not known" if unknown else "")
