"""Names for the positions of a cache and for their classes, for messages and reports."""

from __future__ import annotations

from typing import Literal

from pipeline.records import Contract
from pipeline.tasks import Task, get_task

Unit = Literal["rows", "words", "labels", "scores", "positions"]


def unit_of(task: Task) -> Unit:
    """Return what each soft label belongs to: a row, word, label or score of a row, or position."""
    if task.target == "score":
        return "scores"
    if task.names == "positions":
        return "labels"
    if task.label_source == "positions" and task.marks_positions:
        return "words"
    return "positions" if task.marks_positions or task.names == "places" else "rows"


def position_name(task: Task) -> str:
    """Return the name of a position: `word`, `label`, `score`, `end` of an answer or `position`."""
    if task.names == "places":
        return "end"
    return {"words": "word", "labels": "label", "scores": "score"}.get(unit_of(task), "position")


def a_position(task: Task) -> str:
    """Return `position_name` with its article: `a word`, `an end`."""
    name = position_name(task)
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def resampled_name(task: Task) -> Literal["list", "text", "row"]:
    """Return the name of what bootstrap intervals resample: `Predictions.groups`, or rows.

    The positions within one of these depend on each other.
    """
    if task.ranks:
        return "list"
    return "text" if task.label_source == "hidden" or task.names == "places" else "row"


def classes_of(contract: Contract) -> tuple[str, ...] | None:
    """Return the names of the classes of a position, or None if they are tokens."""
    if get_task(contract.task).names == "places":
        return tuple(f"token {i}" for i in range(contract.num_classes))
    return ("no", "yes") if get_task(contract.task).names == "positions" else contract.label_names


def classes_text(contract: Contract) -> str:
    """Return the number of classes of a position, or of labels or scores of a row, as text."""
    if unit_of(get_task(contract.task)) == "scores":
        return f"{len(contract.label_names or ()):,} scores" if len(contract.label_names or ()) != 1 else "1 score"
    if get_task(contract.task).names == "positions":
        return f"{len(contract.label_names or ()):,} labels"
    return f"{contract.num_classes:,} classes"
