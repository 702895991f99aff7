"""Effects of architecture, teacher and hyperparameters, where students differ in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pipeline.evaluation.basis import Basis
from pipeline.evaluation.measures.quality import retention
from pipeline.evaluation.measures.scores import Scores
from pipeline.evaluation.measures.subjects import Subject
from pipeline.evaluation.records import Determinant, Level

ARCHITECTURE = "Does the student's architecture decide?"
TEACHER = "Does the quality of the teacher decide?"
BALANCE = "Does the balance of the hyperparameters decide?"
QUESTIONS = (ARCHITECTURE, TEACHER, BALANCE)


def determinants(basis: Basis, subjects: Sequence[Subject], scores: Scores) -> tuple[Determinant, ...]:
    """One table per factor with several values among the students; controls are left out.

    The mean of a level is over all students with that value, whatever their other factors. In a
    full grid it is the main effect of the factor.
    """
    students = [subject for subject in subjects if subject.model.role == "student"]
    factors: list[tuple[str, str, Callable[[Subject], str | None]]] = [
        (ARCHITECTURE, "architecture", _architecture),
        (TEACHER, "teacher", lambda s: _teacher(basis, s, scores)),
        (BALANCE, "temperature", lambda s: _loss(s, "temperature")),
        (BALANCE, "soft : hard weight", _weights),
        (BALANCE, "divergence", lambda s: _loss(s, "divergence")),
        (BALANCE, "learning rate", _learning_rate),
    ]
    found = []
    for question, factor, value_of in factors:
        groups: dict[str, list[Subject]] = {}
        for student in students:
            value = value_of(student)
            if value is not None:
                groups.setdefault(value, []).append(student)
        if len(groups) > 1:
            levels = tuple(_level(basis, value, members, scores) for value, members in groups.items())
            means = [level.mean for level in levels]
            found.append(Determinant(question, factor, levels, max(means) - min(means)))
    return tuple(found)


def _level(basis: Basis, value: str, members: Sequence[Subject], scores: Scores) -> Level:
    means = [scores[member.name, basis.main_metric].mean for member in members]
    kept = [retention(basis, scores, member.name, member.teacher.name).value for member in members]
    names = tuple(member.name for member in members)
    return Level(value, names, float(np.mean(means)), min(means), max(means), float(np.mean(kept)))


def _architecture(subject: Subject) -> str:
    return f"{subject.model.architecture}, {subject.model.num_parameters / 1e6:.1f}M"


def _teacher(basis: Basis, subject: Subject, scores: Scores) -> str:
    value = scores[subject.teacher.name, basis.main_metric].mean
    shown = f"{value:.1%}" if basis.main_metric == "accuracy" else f"{value:.3f}"
    return f"{subject.teacher.name}, {basis.main_metric} {shown}"


def _loss(subject: Subject, name: str) -> str | None:
    loss = subject.model.runs[0].loss
    if loss is None or not (loss.soft_weight or loss.soft_weight_end):
        return None
    value = getattr(loss, name)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _weights(subject: Subject) -> str | None:
    loss = subject.model.runs[0].loss
    return None if loss is None else f"{loss.soft_weight:g} : {loss.hard_weight:g}"


def _learning_rate(subject: Subject) -> str | None:
    rate = subject.model.runs[0].learning_rate
    return None if rate is None else f"{rate:g}"
