"""The verdict in one sentence, with its interval and the results of the controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from pipeline.evaluation.basis import Basis
from pipeline.evaluation.measures.quality import NEGLIGIBLE, difference, retention
from pipeline.evaluation.measures.scores import Scores
from pipeline.evaluation.measures.subjects import Subject
from pipeline.evaluation.records import GapShare, Verdict
from pipeline.evaluation.report.forms import uncertainty, with_interval
from pipeline.metrics import number


def headline(basis: Basis, subjects: Sequence[Subject], split: str | None) -> tuple[Subject, str]:
    """The headline student and how it was chosen; never chosen on the reported rows."""
    students = [subject for subject in subjects if subject.model.role == "student"]
    if len(students) == 1:
        return students[0], "the only student"
    ranked = [student for student in students if student.chosen_by is not None]
    if split is None or len(ranked) < len(students):
        return students[0], "the first student named"
    best = (max if basis.higher_is_better else min)(ranked, key=lambda s: s.chosen_by or 0.0)
    return best, f"the best of {len(students)} students on the split {split}"


#: Equivalence margin, as a share of the teacher's metric. A student whose whole interval is above
#: minus the margin performs as well as the teacher.
_MARGIN = 0.01


def verdict(
    basis: Basis,
    student: Subject,
    chosen: str,
    subjects: Sequence[Subject],
    shares: Sequence[GapShare],
    scores: Scores,
    *,
    split: str,
) -> Verdict:
    """Whether the student performs as well as its teacher.

    `no` if the whole interval of the difference is below 0, `better` if it is above 0, `yes` if its
    lower end is within 1% of the teacher's metric. Otherwise `open`: not finding a difference does
    not show that there is none. `unknown` if there is no interval. The sentence also names the
    controls that are better than the student.
    """
    metric = basis.main_metric
    gain = difference(basis, scores, student.name, student.teacher.name, metric)
    interval = gain.interval
    least = NEGLIGIBLE * abs(scores[student.teacher.name, metric].mean)
    theirs = scores[student.teacher.name, metric].mean
    answer: Literal["yes", "no", "better", "open", "unknown"] = "open"
    if interval is None:
        answer = "unknown"
    elif interval.high < -least:
        answer = "no"
    elif interval.low > least:
        answer = "better"
    elif interval.low >= -_MARGIN * abs(theirs):
        answer = "yes"
    kept = retention(basis, scores, student.name, student.teacher.name)
    ours = scores[student.name, metric].mean
    teacher_parameters = student.teacher.cache.manifest.contract.teacher.num_parameters
    size = (
        f", with {student.model.num_parameters / teacher_parameters:.1%} of its parameters"
        if teacher_parameters
        else ""
    )
    opening = {
        "yes": f"Yes, to within {_MARGIN:.0%}",
        "no": "Not quite" if kept.value >= 0.95 else "No",
        "better": "Yes, and better",
        "open": "These rows and seeds do not settle it",
        "unknown": "That cannot be said",
    }[answer]
    sentence = (
        f"{opening}: {student.name} keeps {with_interval(kept, share=True)} of its teacher's {metric} on {split}, {_counted(student)} "
        f"({number(metric, ours)} against {number(metric, theirs)}{size}; {uncertainty(kept, len(student.seen))})."
    )
    beside = ""
    controls = [subject for subject in subjects if subject.model.role == "control"]
    ahead = [control for control in controls if _is_ahead(basis, scores, control.name, student.name, least)]
    if ahead:
        shown = ", ".join(f"{each.name} {number(metric, scores[each.name, metric].mean)}" for each in ahead)
        sentence += f" But the soft labels did not help: controls are better ({shown}); check the teacher."
    if controls:
        each = "; ".join(
            f"{control.name} keeps {with_interval(retention(basis, scores, control.name, control.teacher.name), share=True)}"
            for control in controls
        )
        beside = f"Controls: {each}."
    closed = [
        f"{with_interval(item.share, share=True)} of the gap from {item.control} to the teacher"
        if item.share.value >= 0
        else f"none of that from {item.control}, which is ahead of it"
        for item in shares
        if item.student == student.name and item.metric == metric and item.share is not None
    ]
    gap = f"{student.name} closes {' and '.join(closed)}." if closed else ""
    return Verdict(student.name, chosen, answer, sentence, beside, gap)


def _is_ahead(basis: Basis, scores: Scores, control: str, student: str, least: float) -> bool:
    """Whether the whole interval of the difference is in favour of the control."""
    interval = difference(basis, scores, control, student, basis.main_metric).interval
    return interval is not None and interval.low > least


def _counted(student: Subject) -> str:
    """The number of labelled rows that the metric covers, in words."""
    predictions = student.teacher.seen.predictions
    rows = len(np.unique(predictions.rows[student.teacher.seen.labelled]))
    return f"{rows:,} rows"
