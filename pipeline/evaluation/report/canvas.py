"""Axes and colours of figures for light and dark pages, and PNG output."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.metrics import number

_WIDTH = 5.0
_DPI = 144


@dataclass(frozen=True, slots=True)
class Style:
    """Colours of a light or a dark page."""

    ink: str
    faint: str
    paper: str
    colours: tuple[str, ...]
    """The palette of Okabe and Ito, which is safe for colour-blind readers. The teacher has the
    colour of text."""


LIGHT = Style(
    "#1f2328",
    "#d0d7de",
    "#ffffff",
    ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#a89600", "#8c6bb1"),
)
DARK = Style(
    "#e6edf3",
    "#3d444d",
    "#151b23",
    ("#56b4e9", "#e69f00", "#2fc494", "#e19ac6", "#ff8a4d", "#9fd3f5", "#f0e442", "#b79be0"),
)


def make_axes(
    rows: int,
    height: float,
    style: Style,
    *,
    columns: int = 1,
    share: bool = False,
    heights: Sequence[float] | None = None,
) -> tuple[Any, list[Any]]:
    """Create a figure with a grid of axes; the axes are listed row by row."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(_WIDTH, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share, height_ratios=heights)
    axes = list(grid.ravel())
    figure.set_facecolor(style.paper)
    for axis in axes:
        axis.set_facecolor(style.paper)
        axis.tick_params(colors=style.ink, labelsize=8, length=2)
        axis.grid(color=style.faint, linewidth=0.5)
        axis.set_axisbelow(True)
        for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
            text.set_color(style.ink)
            text.set_fontsize(9)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(style.faint)
    return figure, axes


def add_legend(figure: Any, axes: Any, style: Style, *, columns: int) -> None:
    """Add one legend below all axes."""
    many = axes if isinstance(axes, list) else [axes]
    handles = [handle for axis in many for handle in axis.get_legend_handles_labels()[0]]
    labels = [label for axis in many for label in axis.get_legend_handles_labels()[1]]
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False, labelcolor=style.ink
    )


def percent(axis: Any, metric: str) -> None:
    """Format ticks in percent if the metric is a share."""
    if number(metric, 0.5).endswith("%"):
        axis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")


def short_count(value: float, _: object) -> str:
    """Format a count, for example 4400000 as 4.4M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def png(figure: Any, style: Style) -> bytes | None:
    """Render a figure as PNG; None stays None."""
    if figure is None:
        return None
    from PIL import Image  # a dependency of matplotlib

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI, facecolor=style.paper)
    # A palette reduces the size to a third; figures have few colours.
    Image.open(drawn).convert("RGB").quantize(96).save(small, format="PNG", optimize=True)
    return small.getvalue()
