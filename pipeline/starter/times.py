"""Estimate how long each stage takes on this machine, in words."""

from __future__ import annotations

import dataclasses

from pipeline.config import TrainStudentConfig, TrainTeacherConfig
from pipeline.starter.records import Start

#: Time of a training step relative to a forward pass (a backward pass takes twice as long), and of
#: padded batches relative to unpadded ones.
_TRAINING = 3.0
_PADDING = 1.2
_FEW_SECONDS = 10


def teacher_time(start: Start) -> str:
    """The time of `train-teacher`."""
    return _passes(start, start.labelled, 1.0, TrainTeacherConfig, "labelled rows")


def cache_time(start: Start) -> str:
    """The time of `cache-logits`."""
    if start.speed is None:
        return ""
    rows = sum(split.rows for split in start.counts.splits.values())
    return _said(start, _forward(start, rows), f"once over {rows:,} rows")


def student_time(start: Start) -> str:
    """The time to train one student."""
    share = 1.0 if start.speed is None else start.speed.student
    return _passes(start, start.counts.splits["train"].rows, share, TrainStudentConfig, "rows")


def _passes(start: Start, rows: int, share: float, config: type, what: str) -> str:
    if start.speed is None:
        return ""
    one = _forward(start, rows) * _TRAINING * share
    count = next(field.default for field in dataclasses.fields(config) if field.name == "epochs")
    if isinstance(count, int | float):
        return _said(start, one * count, f"{count:g} passes over {rows:,} {what}")
    return _said(start, one, f"each pass over {rows:,} {what}")


def _forward(start: Start, rows: int) -> float:
    """Seconds of a forward pass over `rows` rows."""
    assert start.speed is not None
    return rows * start.lengths.mean * _PADDING * start.speed.seconds


def _said(start: Start, seconds: float, what: str) -> str:
    assert start.speed is not None
    about = "" if seconds < _FEW_SECONDS else "about " if start.speed.is_measured else "roughly "
    return f"{about}{duration(seconds)} ({what})"


def duration(seconds: float) -> str:
    """Format a time with one or two digits."""
    if seconds < _FEW_SECONDS:
        return "a few seconds"
    if seconds < 90:
        return f"{round(seconds, -1):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.2g} h" if seconds < 360_000 else f"{seconds / 86400:,.0f} days"
