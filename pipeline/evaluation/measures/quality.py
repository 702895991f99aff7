"""Quality: metrics, retention, paired comparisons, and the share of the gap that is closed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from pipeline.evaluation.basis import BITS_PER_BYTE, OF_TOKENS, Basis, on_bytes_of
from pipeline.evaluation.measures.observation import Observation
from pipeline.evaluation.measures.scores import HIGHER, Scores
from pipeline.evaluation.measures.statistics import holm, mcnemar, paired_permutation, paired_t
from pipeline.evaluation.measures.subjects import Subject, Teacher, same_seeds
from pipeline.evaluation.records import Comparison, GapShare, Measured, Quality, TeacherLine
from pipeline.metrics import paired_mean_interval

#: Differences below this share of the teacher's metric are treated as rounding.
NEGLIGIBLE = 1e-4

_FEW = 4
"""Maximum number of students that are all compared with every control."""


def compared_metrics(basis: Basis, scores: Scores) -> tuple[str, ...]:
    """The main metric; with one tokenizer for all, also the other one of accuracy and loss."""
    if basis.in_bytes:
        return (basis.main_metric,)
    others = [name for name in ("accuracy", "loss", "mse") if name != basis.main_metric and name in scores.metrics]
    return (basis.main_metric, *others)


def is_higher(basis: Basis, metric: str) -> bool:
    """Whether higher values of a metric are better."""
    return basis.higher_is_better if metric == basis.main_metric else metric in HIGHER


def teacher_line(basis: Basis, teacher: Teacher, scores: Scores) -> TeacherLine:
    """The teacher's metrics, with intervals over rows."""
    contract = teacher.cache.manifest.contract
    return TeacherLine(
        name=teacher.name,
        cache=contract.teacher.name,
        cache_id=teacher.cache.manifest.cache_id,
        num_parameters=contract.teacher.num_parameters,
        metrics=_metrics(basis, contract.num_classes, teacher.name, (teacher.seen,), scores),
    )


def quality_lines(basis: Basis, subjects: Sequence[Subject], scores: Scores) -> tuple[Quality, ...]:
    """Each student and control, as trained and then with temperature scaling."""
    lines = []
    for subject in subjects:
        for name, seen, scaled in (
            (subject.name, subject.seen, False),
            (subject.scaled_name, subject.scaled, True),
        ):
            if not seen:
                continue
            num_classes = subject.cache.manifest.contract.num_classes
            lines.append(
                Quality(
                    name=name,
                    role=subject.model.role,
                    teacher=subject.teacher.name,
                    num_seeds=len(seen),
                    metrics=_metrics(basis, num_classes, name, seen, scores),
                    retention=retention(basis, scores, name, subject.teacher.name),
                    difference=difference(basis, scores, name, subject.teacher.name, basis.main_metric),
                    scaled=scaled,
                )
            )
    return tuple(lines)


def retention(basis: Basis, scores: Scores, name: str, teacher: str) -> Measured:
    """A model's main metric divided by its teacher's; inverted for a loss."""
    pair = (name, teacher) if basis.higher_is_better else (teacher, name)
    return scores.combined(lambda a, b: a / b, pair, basis.main_metric)


def difference(basis: Basis, scores: Scores, first: str, second: str, metric: str, *, paired: bool = True) -> Measured:
    """How much better the first model is; below 0: worse."""
    pair = (first, second) if is_higher(basis, metric) else (second, first)
    return scores.combined(lambda a, b: a - b, pair, metric, paired=paired)


def comparisons(
    basis: Basis, subjects: Sequence[Subject], headline: Subject, scores: Scores, *, seed: int
) -> tuple[Comparison, ...]:
    """Compare students with teacher and controls, and the headline student with the others.

    The loss is also compared with every control after temperature scaling, which changes no
    prediction. With many students, only the headline student is compared with the controls, since
    p-values are adjusted together and more tests reduce the power of each.
    """
    students = [subject for subject in subjects if subject.model.role == "student"]
    controls = [subject for subject in subjects if subject.model.role == "control"]
    found = []
    for metric in compared_metrics(basis, scores):
        for student in students:
            met = controls if student is headline or len(students) <= _FEW else []
            others: list[Subject] = [*met, *(students if student is headline else ())]
            found.append(_against_teacher(basis, student, metric, scores, seed))
            found += [_pair(basis, student, other, metric, scores, seed) for other in others if other is not student]
            if metric in ("loss", BITS_PER_BYTE):
                found += [_pair(basis, student, control, metric, scores, seed, scaled=True) for control in met]
    adjusted = holm([item.p_value for item in found])
    return tuple(dataclasses.replace(item, p_adjusted=p) for item, p in zip(found, adjusted, strict=True))


def gap_shares(basis: Basis, subjects: Sequence[Subject], scores: Scores) -> tuple[GapShare, ...]:
    """The gap share of each student and each control with the same teacher."""
    found = []
    for metric in compared_metrics(basis, scores):
        for student in (subject for subject in subjects if subject.model.role == "student"):
            for control in (subject for subject in subjects if subject.model.role == "control"):
                if control.teacher is not student.teacher:
                    continue
                share = gap_share(basis, student, control, metric, scores)
                found.append(GapShare(student.name, control.name, metric, share))
    return tuple(found)


def gap_share(basis: Basis, student: Subject, control: Subject, metric: str, scores: Scores) -> Measured | None:
    """(student - control) / (teacher - control).

    None if the control is behind the teacher in fewer than 97.5% of the resamples.
    """
    names = (student.name, control.name, student.teacher.name)
    behind = scores[names[2], metric].resampled - scores[names[1], metric].resampled
    if not is_higher(basis, metric):
        behind = -behind
    least = NEGLIGIBLE * abs(scores[names[2], metric].mean)
    if not np.isfinite(behind).all() or np.quantile(behind, 0.025) <= least:
        return None
    return scores.combined(lambda s, c, t: (s - c) / (t - c), names, metric, paired=same_seeds(student, control))


def _metrics(
    basis: Basis, num_classes: int, name: str, seen: Sequence[Observation], scores: Scores
) -> dict[str, Measured]:
    """The task's metrics and the Brier score.

    Metrics that are not a mean over positions have an interval over seeds only.
    """
    by_seed = [basis.task.metrics(one.predictions, num_classes) for one in seen]
    found = {}
    for metric in by_seed[0]:
        if seen[0].teacher_position is not None and metric in OF_TOKENS:
            continue
        if scores.has(name, metric):
            found[metric] = scores.measured(name, metric)
            continue
        values = np.array([metrics[metric] for metrics in by_seed])
        interval = paired_mean_interval(values) if len(values) > 1 and np.isfinite(values).all() else None
        found[metric] = Measured(float(values.mean()), None, seeds=interval)
    if scores.has(name, "brier"):
        found["brier"] = scores.measured(name, "brier")
    return found


def _apart(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Differences per row; those within rounding are 0."""
    return np.where(np.abs(first - second) <= NEGLIGIBLE * np.abs(second), 0.0, first - second)


def _against_teacher(basis: Basis, student: Subject, metric: str, scores: Scores, seed: int) -> Comparison:
    """Compare a student with its teacher, whose single seed pairs with each of the student's."""
    teacher = student.teacher
    return _compare(
        basis, (student.name, student.seen), (teacher.name, (teacher.seen,)), metric, scores, seed, paired=True
    )


def _pair(
    basis: Basis, first: Subject, second: Subject, metric: str, scores: Scores, seed: int, *, scaled: bool = False
) -> Comparison:
    other = (second.scaled_name, second.scaled) if scaled else (second.name, second.seen)
    paired = same_seeds(first, second)
    return _compare(basis, (first.name, first.seen), other, metric, scores, seed, paired=paired)


def _compare(
    basis: Basis,
    first: tuple[str, Sequence[Observation]],
    second: tuple[str, Sequence[Observation]],
    metric: str,
    scores: Scores,
    seed: int,
    *,
    paired: bool,
) -> Comparison:
    a, b = scores[first[0], metric], scores[second[0], metric]
    ours, theirs = (a.rows, a.weights), (b.rows, b.weights)
    if metric == BITS_PER_BYTE:  # rescale to the same bytes per row, so that sums compare
        ours = on_bytes_of(*ours, b.weights)
        theirs = on_bytes_of(*theirs, ours[1])
    single = len(first[1]) == len(second[1]) == 1
    one_a_row = bool((a.weights <= 1).all())
    if metric == "accuracy" and single and one_a_row:
        test, p = "McNemar, exact", mcnemar(a.rows > 0.5, b.rows > 0.5)
    elif not np.array_equal(ours[1], theirs[1]):  # denominators differ: no row sums to flip
        test, p = "none", math.nan
    else:
        test, p = "sign flips over rows", paired_permutation(_apart(ours[0], theirs[0]), seed=seed)
    seeds = None
    if paired and (len(a.by_seed) > 1 or len(b.by_seed) > 1):
        seeds = paired_t(a.by_seed - b.by_seed)
    return Comparison(
        first=first[0],
        second=second[0],
        metric=metric,
        difference=difference(basis, scores, first[0], second[0], metric, paired=paired),
        test=test,
        p_value=p,
        p_adjusted=math.nan,
        p_seeds=seeds,
    )
