"""The report's figures, each drawn for a light and a dark page.

Figures are at most 5 inches wide, to be readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import MisuseError
from pipeline.evaluation.records import Bin, Measured, Report
from pipeline.evaluation.report.canvas import DARK, LIGHT, Style, add_legend, make_axes, percent, png, short_count

_FEWEST = 5
"""Minimum number of predictions for a bin of a reliability diagram to be drawn."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure of the page, in both styles."""

    name: str
    title: str
    alt: str
    light: bytes
    """PNG."""
    dark: bytes


def require_matplotlib() -> None:
    """Check that figures can be drawn.

    Raises:
        MisuseError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MisuseError("softlabel report draws with matplotlib: pip install 'soft-label-pipeline[report]'") from None


def draw_all(report: Report) -> tuple[Picture, ...]:
    """Draw every figure for which the report has data.

    Raises:
        MisuseError: matplotlib is not installed.
    """
    require_matplotlib()
    names = ", ".join(model.name for model in report.models)
    metric = report.main_metric
    wanted: list[tuple[str, str, str, Callable[[Report, Style], Any]]] = [
        ("quality", "Quality", f"{metric} of the teacher and of {names}, with 95% intervals", draw_quality),
        (
            "fidelity",
            "Agreement with the teacher",
            f"Where {names} agree with the teacher, and where not",
            draw_fidelity,
        ),
        (
            "reliability",
            "Reliability diagrams",
            f"Accuracy against confidence of the teacher and of {names}",
            draw_reliability,
        ),
        (
            "pareto",
            "Quality against size",
            f"{metric} of {names} and of the teacher against their parameters",
            draw_pareto,
        ),
        ("training", "Training", f"Loss terms, learning rate and evaluations of {names} over the steps", draw_training),
        ("determinants", "Determinants", f"{metric} by architecture, teacher and hyperparameters", draw_determinants),
    ]
    found = []
    for name, title, alt, draw in wanted:
        images = [png(draw(report, style), style) for style in (LIGHT, DARK)]
        if images[0] is not None and images[1] is not None:
            found.append(Picture(name, title, alt, images[0], images[1]))
    return tuple(found)


def draw_quality(report: Report, style: Style) -> Any:
    """Main metric and loss or accuracy of each model, with intervals; the teacher's as a band."""
    metrics = [report.main_metric, *(m for m in ("accuracy", "loss", "mse") if m != report.main_metric)]
    lines = [line for line in report.quality if not line.scaled]
    metrics = [m for m in metrics if all(m in line.metrics for line in lines)]
    count = len(lines) + len(report.teachers)
    figure, axes = make_axes(len(metrics), (0.34 * count + 0.75) * len(metrics), style)
    for axis, metric in zip(axes, metrics, strict=True):
        first = report.teachers[0].metrics.get(metric)
        if first is not None and math.isfinite(first.value):
            axis.axvline(first.value, color=style.ink, alpha=0.45, linewidth=1, linestyle="--")
            if first.interval is not None:
                axis.axvspan(first.interval.low, first.interval.high, color=style.ink, alpha=0.07, linewidth=0)
        rows: list[tuple[str, Measured | None, str, str]] = [
            (teacher.name, teacher.metrics.get(metric), style.ink, "D") for teacher in report.teachers
        ]
        rows += [
            (line.name, line.metrics[metric], _colour(report, style, line.name), "o" if line.role == "student" else "s")
            for line in lines
        ]
        for y, (_, found, colour, marker) in enumerate(rows):
            _point(axis, found, y, colour, marker)
        axis.set_yticks(range(len(rows)), [row[0] for row in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xlabel(metric if metric == "accuracy" else f"{metric}, nats" if metric == "loss" else metric)
        percent(axis.xaxis, metric)
    return figure


def draw_fidelity(report: Report, style: Style) -> Any:
    """Agreement where the teacher is right or wrong, and corrected teacher errors, per model."""
    lines = report.closeness
    if all(math.isnan(line.on_right) for line in lines):
        return None
    parts = (
        ("agrees where the teacher is right", "on_right", style.colours[0]),
        ("agrees where the teacher errs: copies the mistake", "on_errors", style.colours[4]),
        ("is right where the teacher errs", "mended", style.colours[2]),
    )
    figure, (axis,) = make_axes(1, 0.55 * len(lines) + 1.35, style)
    for i, (label, field, colour) in enumerate(parts):
        values = [getattr(line, field) for line in lines]
        where = [y + (i - 1) * 0.26 for y in range(len(lines))]
        axis.barh(where, [0.0 if math.isnan(v) else v for v in values], height=0.24, color=colour, label=label)
    axis.set_yticks(range(len(lines)), [line.name for line in lines])
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    percent(axis.xaxis, "accuracy")
    add_legend(figure, axis, style, columns=1)
    return figure


def draw_reliability(report: Report, style: Style) -> Any:
    """Reliability diagrams of all models, as trained and with temperature scaling."""
    plain = [line for line in report.calibrations if line.temperature is None and line.bins][:12]
    if not plain:
        return None
    scaled = {line.name: line for line in report.calibrations if line.temperature is not None}
    columns = min(2, len(plain))
    rows = math.ceil(len(plain) / columns)
    figure, axes = make_axes(rows, 2.35 * rows + 0.35, style, columns=columns, share=True)
    for axis, line in zip(axes, plain, strict=False):
        axis.plot([0, 1], [0, 1], color=style.ink, alpha=0.4, linewidth=1, linestyle="--")
        colour = _colour(report, style, line.name) or style.ink
        _curve(axis, line.bins, colour, "-", "o", "as trained")
        other = scaled.get(f"{line.name}, scaled")
        if other is not None and other.bins:
            _curve(axis, other.bins, colour, ":", "x", "with temperature scaling")
        axis.set_title(
            f"{line.name}\nECE {line.ece:.1%}" + ("" if other is None else f", scaled {other.ece:.1%}"), fontsize=9
        )
        axis.set_aspect("equal")
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
        percent(axis.xaxis, "accuracy")
        percent(axis.yaxis, "accuracy")
    for axis in axes[len(plain) :]:
        axis.set_visible(False)
    figure.supxlabel("confidence", color=style.ink, fontsize=9)
    figure.supylabel("accuracy", color=style.ink, fontsize=9)
    return figure


def draw_pareto(report: Report, style: Style) -> Any:
    """Main metric against parameters; a line joins the models that no smaller one beats."""
    points: list[tuple[int, Measured, str, str, str]] = [
        (
            model.num_parameters,
            _metric_of(report, model.name),
            model.name,
            _colour(report, style, model.name),
            model.role,
        )
        for model in report.models
    ]
    points += [
        (t.num_parameters, t.metrics[report.main_metric], t.name, style.ink, "teacher")
        for t in report.teachers
        if t.num_parameters
    ]
    from matplotlib.ticker import LogLocator

    points = [point for point in points if math.isfinite(point[1].value)]
    figure, (axis,) = make_axes(1, 3.4, style)
    axis.set_xscale("log")
    beside: dict[int, int] = {}
    for size, found, name, colour, role in points:
        x = size * 1.03 ** beside.get(size, 0)  # shift models of one size apart
        beside[size] = beside.get(size, 0) + 1
        interval = found.interval
        if interval is not None:
            axis.plot([x, x], [interval.low, interval.high], color=colour, linewidth=1.5, alpha=0.6)
        marker = {"student": "o", "control": "s", "teacher": "D"}[role]
        axis.plot([x], [found.value], marker=marker, color=colour, markersize=6, linestyle="none", label=name)
    front = pareto_front([(x, f.value) for x, f, *_ in points], higher=report.higher_is_better)
    axis.plot(*zip(*front, strict=True), color=style.ink, alpha=0.45, linewidth=1, drawstyle="steps-post", zorder=0)
    axis.set_xlabel("parameters")
    axis.set_ylabel(report.main_metric)
    axis.margins(x=0.12)
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(short_count)
    axis.xaxis.set_minor_formatter(lambda *_: "")
    percent(axis.yaxis, report.main_metric)
    if not report.higher_is_better:
        axis.invert_yaxis()
    add_legend(figure, axis, style, columns=2)
    return figure


def pareto_front(points: Sequence[tuple[float, float]], *, higher: bool) -> list[tuple[float, float]]:
    """The points (size, metric) with no better point of smaller or equal size, sorted by size."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1] if higher else p[1])):
        if not front or (y > front[-1][1] if higher else y < front[-1][1]):
            front.append((x, y))
    return front


def draw_training(report: Report, style: Style) -> Any:
    """Panels of losses, learning rate and evaluations, if the log has them.

    Losses are the soft loss, the hard loss and the loss over aligned spans.
    """
    shown = {
        "soft_loss": "soft loss",
        "hard_loss": "hard loss",
        "span_loss": "span loss",
        "learning_rate": "learning rate",
        f"eval_{report.main_metric}": f"evaluation: {report.main_metric}",
        "eval_nll": "evaluation: loss",
        "eval_agreement": "evaluation: agreement",
    }
    if report.tokenizer_notes:  # losses per token are not comparable
        shown = {name: label for name, label in shown.items() if not name.endswith(("loss", "nll"))}
    if not report.higher_is_better:  # `loss` of the evaluation is minimized
        shown.pop("eval_loss", None)
    panels = [
        (name, label)
        for name, label in shown.items()
        if any(name in entry for model in report.models for run in model.runs for entry in run.history)
    ]
    if not panels:
        return None
    figure, axes = make_axes(len(panels), 1.55 * len(panels) + 0.9, style)
    labelled: set[str] = set()
    for axis, (name, label) in zip(axes, panels, strict=True):
        for model in report.models:
            for i, run in enumerate(model.runs):
                points = [(entry["step"], entry[name]) for entry in run.history if name in entry]
                if points:
                    _trace(
                        axis,
                        points,
                        _colour(report, style, model.name),
                        None if model.name in labelled else model.name,
                        i,
                    )
                    labelled.add(model.name)
        if name.endswith("loss") and _positive(axis):
            axis.set_yscale("log")
            axis.yaxis.set_minor_formatter(lambda *_: "")
        axis.set_ylabel(label)
        percent(axis.yaxis, name.removeprefix("eval_"))
    axes[-1].set_xlabel("step")
    add_legend(figure, axes, style, columns=2)
    return figure


def draw_determinants(report: Report, style: Style) -> Any:
    """One panel per factor: the mean of each level with its best and worst student."""
    if not report.determinants:
        return None
    heights = [0.32 * len(item.levels) + 0.8 for item in report.determinants]
    figure, axes = make_axes(len(heights), sum(heights), style, heights=heights)
    for axis, item in zip(axes, report.determinants, strict=True):
        for y, level in enumerate(item.levels):
            axis.plot(
                [level.low, level.high], [y, y], color=style.colours[0], alpha=0.4, linewidth=3, solid_capstyle="round"
            )
            axis.plot([level.mean], [y], "o", color=style.colours[0], markersize=6)
        axis.set_yticks(range(len(item.levels)), [_wrap(level.value) for level in item.levels])
        axis.set_ylim(len(item.levels) - 0.5, -0.5)
        axis.set_title(item.factor, fontsize=9)
        percent(axis.xaxis, report.main_metric)
    axes[-1].set_xlabel(report.main_metric)
    return figure


# -------------------------------------------------------------------------------------------- parts


def _point(axis: Any, found: Measured | None, y: float, colour: str, marker: str) -> None:
    if found is None or not math.isfinite(found.value):
        return
    if found.interval is not None:
        axis.plot([found.interval.low, found.interval.high], [y, y], color=colour, linewidth=2)
    axis.plot([found.value], [y], marker, color=colour, markersize=6)


def _curve(axis: Any, bins: Sequence[Bin], colour: str, line: str, marker: str, label: str) -> None:
    firm = [item for item in bins if item.count >= _FEWEST]
    axis.plot(
        [item.confidence for item in firm],
        [item.accuracy for item in firm],
        color=colour,
        linestyle=line,
        marker=marker,
        markersize=3.5,
        linewidth=1.2,
        label=label,
    )
    most = max(item.count for item in bins)
    if line == "-":  # the number of predictions of each point
        axis.bar(
            [b.confidence for b in bins], [0.18 * b.count / most for b in bins], width=0.04, color=colour, alpha=0.25
        )


def _trace(axis: Any, points: list[tuple[float, float]], colour: str, label: str | None, seed: int) -> None:
    steps, values = zip(*points, strict=True)
    style = {"marker": "o", "markersize": 3} if len(points) < 12 else {}
    axis.plot(steps, values, color=colour, linewidth=1.3, alpha=1.0 if seed == 0 else 0.45, label=label, **style)


def _positive(axis: Any) -> bool:
    return all(value > 0 for line in axis.get_lines() for value in line.get_ydata())


def _wrap(text: str) -> str:
    return text.replace(", ", ",\n", 1) if len(text) > 26 else text


def _colour(report: Report, style: Style, name: str) -> str:
    """The colour of a model; '' for a teacher."""
    names = [model.name for model in report.models]
    return style.colours[names.index(name) % len(style.colours)] if name in names else ""


def _metric_of(report: Report, name: str) -> Measured:
    return next(line for line in report.quality if line.name == name).metrics[report.main_metric]
