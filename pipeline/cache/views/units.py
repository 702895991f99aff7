"""What the positions of a cache are, in words, and what their classes are called."""

from __future__ import annotations

from typing import Literal

from pipeline.records import Contract
from pipeline.tasks import Task, get_task

Unit = Literal["rows", "words", "labels", "scores", "positions"]


def unit_of(task: Task) -> Unit:
    """What a soft label is of: a whole row, a word, one of several labels of a row, one of its scores, or a position among tokens."""
    if task.target == "score":
        return "scores"
    if task.names == "positions":
        return "labels"
    if task.label_source == "positions" and task.marks_positions:
        return "words"
    return "positions" if task.marks_positions or task.names == "places" else "rows"


def position_name(task: Task) -> str:
    """One position, where what it is of is told: `word`, `label`, `score`, `end` of an answer, or `position`."""
    if task.names == "places":
        return "end"
    return {"words": "word", "labels": "label", "scores": "score"}.get(unit_of(task), "position")


def a_position(task: Task) -> str:
    """`position_name` with its article: `a word`, `an end`."""
    name = position_name(task)
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def resampled_name(task: Task) -> Literal["list", "text", "row"]:
    """What intervals resample, since its positions depend on each other: `Predictions.groups`, or rows."""
    if task.ranks:
        return "list"
    return "text" if task.label_source == "hidden" or task.names == "places" else "row"


def classes_of(contract: Contract) -> tuple[str, ...] | None:
    """The names of the classes of a position; None: they are tokens."""
    if get_task(contract.task).names == "places":
        return tuple(f"token {i}" for i in range(contract.num_classes))
    return ("no", "yes") if get_task(contract.task).names == "positions" else contract.label_names


def classes_text(contract: Contract) -> str:
    """How many classes a position has, or of how many labels it is whether a row has them, or how many scores a row has."""
    if unit_of(get_task(contract.task)) == "scores":
        return f"{len(contract.label_names or ()):,} scores" if len(contract.label_names or ()) != 1 else "1 score"
    if get_task(contract.task).names == "positions":
        return f"{len(contract.label_names or ()):,} labels"
    return f"{contract.num_classes:,} classes"
