"""Format numbers and intervals of a report for readers."""

from __future__ import annotations

import math

from pipeline.evaluation.records import Measured, Spread
from pipeline.metrics import number


def uncertainty(found: Measured, num_seeds: int) -> str:
    """The sources of uncertainty that an interval covers, in words."""
    if found.interval is None:
        return "no interval"
    if found.both is not None:
        return f"95% interval over rows and {num_seeds} seeds"
    return "95% interval over rows; " + (
        "one seed: variation between seeds is not covered" if num_seeds == 1 else f"mean over {num_seeds} seeds"
    )


def with_interval(found: Measured, *, share: bool = False, metric: str = "") -> str:
    """Format a value and its interval."""
    if found.value != found.value:
        return "-"
    name = "accuracy" if share else metric
    text = number(name, found.value)
    interval = found.interval
    return text if interval is None else f"{text} ({number(name, interval.low)} to {number(name, interval.high)})"


def parameters(count: int) -> str:
    """Format a number of parameters, for example 4.4M."""
    if not count:
        return "-"
    return f"{count / 1e6:,.1f}M" if count >= 1e5 else f"{count:,}"


def size(count: int) -> str:
    """Format a number of bytes in decimal units, for example 17.6 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def p_value(value: float) -> str:
    """Format a p-value, for example 0.031 or < 0.001."""
    if math.isnan(value):
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def spread_text(found: Spread | None, scale: float, form: str, unit: str = "") -> str:
    """Format median and quartiles, each multiplied by `scale`."""
    if found is None:
        return "-"
    return f"{scale * found.median:{form}}{unit} ({scale * found.low:{form}} to {scale * found.high:{form}})"
