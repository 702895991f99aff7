"""The result of a sweep: runs grouped over seeds, ranked on a split that is not reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.config import SweepConfig
from pipeline.evaluation.basis import BITS_PER_BYTE, Basis
from pipeline.evaluation.table import aligned
from pipeline.metrics import number
from pipeline.records import Interval, Loss, TrainResult
from pipeline.sources.files.loading import redact
from pipeline.sweep.grid import Role
from pipeline.tasks import Task


@dataclass(frozen=True, slots=True)
class SweepRun:
    """One student of a sweep, trained or failed."""

    name: str
    group: str
    role: Role
    cache: str
    cache_id: str
    student: str
    seed: int
    loss: Loss
    teacher_labels: bool
    directory: str
    """Relative to the sweep's output."""
    result: TrainResult | None = None
    """Settings, time and metrics; None if the run failed."""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class SweepGroup:
    """One line of the leaderboard: runs that differ only in their seed."""

    name: str
    role: Role
    seeds: tuple[int, ...]
    """Seeds of the finished runs."""
    failed: int
    num_parameters: int
    metrics: Mapping[str, float]
    """Means over the seeds, on the split that the best group is chosen on."""
    range: Interval | None = None
    """Lowest and highest value over the seeds of the metric that the best group is chosen by."""
    seconds: float = 0.0
    """Mean training time."""


@dataclass(frozen=True, slots=True)
class SweepReport:
    """The content of `sweep.json`."""

    settings: SweepConfig
    runs: tuple[SweepRun, ...]
    groups: tuple[SweepGroup, ...]
    """Best first, if there is a metric to choose by."""
    eval_split: str | None
    chosen_by: str | None
    """The metric that the best group is chosen by; None: there is no split to choose on."""
    higher_is_better: bool
    best: str | None
    """Name of the best group of students; controls are excluded."""
    teachers: Mapping[str, Mapping[str, float]]
    """Cache name -> the teacher's metrics on `eval_split`, if it has labels."""

    @property
    def failed(self) -> tuple[SweepRun, ...]:
        """The runs that failed."""
        return tuple(run for run in self.runs if run.error is not None)


def make_report(
    config: SweepConfig,
    task: Task,
    runs: Sequence[SweepRun],
    teachers: Mapping[str, Mapping[str, float]],
    eval_split: str | None,
) -> SweepReport:
    """Group runs over their seeds, and rank the groups by the task's main metric.

    If the split has no labels, groups are ranked by agreement with the teacher. Ties are ranked by
    the loss. If a student has another tokenizer than its teacher, bits per byte of text replace the
    loss per token.
    """
    basis = Basis(task, in_bytes=_in_bytes(runs))
    main = "nll" if basis.main_metric == "loss" else basis.main_metric
    measured = [run.result.metrics for run in runs if run.result is not None]
    known = set.intersection(*(set(metrics) for metrics in measured)) if measured and eval_split else set()
    chosen_by = next((name for name in (main, "agreement") if name in known), None)
    higher = chosen_by == "agreement" or basis.higher_is_better
    tie = BITS_PER_BYTE if basis.in_bytes else "nll"
    names = list(dict.fromkeys(run.group for run in runs))
    groups = [_group(name, [run for run in runs if run.group == name], chosen_by) for name in names]
    if chosen_by is not None:
        sign = -1 if higher else 1
        groups.sort(key=lambda g: (not g.seeds, sign * g.metrics.get(chosen_by, 0.0), g.metrics.get(tie, 0.0)))
    best = next((g.name for g in groups if g.role == "student" and g.seeds), None) if chosen_by else None
    shown = dataclasses.replace(config, cache=tuple(map(redact, config.cache)))  # without credentials in URLs
    return SweepReport(shown, tuple(runs), tuple(groups), eval_split, chosen_by, higher, best, teachers)


def _group(name: str, runs: Sequence[SweepRun], chosen_by: str | None) -> SweepGroup:
    results = [run.result for run in runs if run.result is not None]
    keys = [key for key in (results[0].metrics if results else {}) if all(key in r.metrics for r in results)]
    values = [result.metrics[chosen_by] for result in results] if chosen_by else []
    return SweepGroup(
        name=name,
        role=runs[0].role,
        seeds=tuple(run.seed for run in runs if run.result is not None),
        failed=sum(run.error is not None for run in runs),
        num_parameters=results[0].num_parameters if results else 0,
        metrics={key: float(np.mean([result.metrics[key] for result in results])) for key in keys},
        range=Interval(min(values), max(values)) if len(values) > 1 else None,
        seconds=float(np.mean([result.seconds for result in results])) if results else 0.0,
    )


def format_leaderboard(report: SweepReport) -> str:
    """Return a table with one line per group, best first, below the teachers on the same split.

    Divergences are left out, since each is at its run's own temperature.
    """
    of_tokens = [BITS_PER_BYTE] if _in_bytes(report.runs) else ["accuracy", "nll"]
    shown = [name for name in dict.fromkeys([report.chosen_by, *of_tokens, "agreement"]) if name]
    known = {name for group in report.groups for name in group.metrics} if report.eval_split else set()
    metrics = [name for name in shown if name in known]
    titles = [*metrics[:1], *(["lowest to highest"] if _ranged(report) else []), *metrics[1:]]
    lines = [["", "", "parameters", "seeds", *titles, "seconds"]]
    lines += [_teacher_cells(name, found, metrics, report) for name, found in report.teachers.items()]
    lines += [_cells(group, metrics, report) for group in report.groups]
    table = "\n".join(aligned(lines, left=2))
    roles = [run.role for run in report.runs]
    counted = ", ".join(f"{roles.count(role)} {role}{'s' * (roles.count(role) != 1)}" for role in dict.fromkeys(roles))
    return "\n\n".join([f"sweep of {counted}{_measured_on(report)}", table, _notes(report)])


def _measured_on(report: SweepReport) -> str:
    """Return the split and the number of rows that the metrics are computed on."""
    rows = next((run.result.eval_rows for run in report.runs if run.result is not None), None)
    if report.eval_split is None:
        return ""
    return f"; metrics on {report.eval_split}" + ("" if rows is None else f", {rows:,} rows")


def _notes(report: SweepReport) -> str:
    if report.chosen_by is None:
        return (
            "  no best student is chosen: the cache has no split `validation` (or --eval-split) to choose on, and choosing on the split that is\n"
            "  reported would give figures that are too good"
        )
    direction = "highest" if report.higher_is_better else "lowest"
    in_bytes = _in_bytes(report.runs)
    tie = BITS_PER_BYTE if in_bytes else "nll"
    tied = "" if report.chosen_by == BITS_PER_BYTE else f" (a tie: by the lowest {tie})"
    notes = [
        f"chosen on the split {report.eval_split}, by the {direction} {report.chosen_by}, the mean over seeds{tied}; never on {report.settings.report_split}",
        "seconds: of training, the mean over seeds",
    ]
    if in_bytes:
        own = dict.fromkeys(run.student for run in report.runs if run.result is not None and run.result.own_tokenizer)
        notes.append(
            f"another tokenizer than the teacher's: {', '.join(own)}; losses and accuracies per token are left out, agreement is over the aligned positions"
        )
    if report.best is not None:
        directories = [run.directory for run in report.runs if run.group == report.best and run.result is not None]
        notes.append(f"best: {report.best}, in {', '.join(directories)} of {report.settings.output}")
    return "\n".join(f"  {note}" for note in notes)


def _in_bytes(runs: Sequence[SweepRun]) -> bool:
    """Return whether a student has another tokenizer than its teacher."""
    return any(run.result is not None and run.result.own_tokenizer is not None for run in runs)


def _ranged(report: SweepReport) -> bool:
    return any(group.range is not None for group in report.groups)


def _cells(group: SweepGroup, metrics: Sequence[str], report: SweepReport) -> list[str]:
    values = [_value(name, group.metrics.get(name)) for name in metrics]
    if _ranged(report):
        spread, by = group.range, report.chosen_by
        values.insert(1, "" if spread is None else f"{_value(by, spread.low)} to {_value(by, spread.high)}")
    return [
        "*" if group.name == report.best else "",
        group.name + (" (control)" if group.role == "control" else ""),
        f"{group.num_parameters / 1e6:.1f}M" if group.num_parameters >= 1e5 else f"{group.num_parameters or ''}",
        f"{len(group.seeds)}" + (f" of {len(group.seeds) + group.failed}" if group.failed else ""),
        *values,
        f"{group.seconds:.0f}" if group.seeds else "failed",
    ]


def _teacher_cells(name: str, found: Mapping[str, float], metrics: Sequence[str], report: SweepReport) -> list[str]:
    title = "teacher" if len(report.teachers) == 1 else f"teacher of {name}"
    values = [_value(metric, found.get("loss" if metric == "nll" else metric)) for metric in metrics]
    if _ranged(report):
        values.insert(1, "")
    return ["", title, "", "", *values, ""]


def _value(name: str | None, value: float | None) -> str:
    return "" if value is None else number(name, value)
