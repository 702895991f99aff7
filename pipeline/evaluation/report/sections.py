"""Sections of text, tables and quotes for page, Markdown and terminal.

Nothing is escaped here; the templates escape all texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.cache.views.units import position_name, resampled_name
from pipeline.evaluation.measures.determinants import QUESTIONS
from pipeline.evaluation.records import Example, Measured, Quality, Report, TeacherLine
from pipeline.evaluation.report.cost_section import cost_section
from pipeline.evaluation.report.forms import p_value, parameters, uncertainty, with_interval
from pipeline.evaluation.report.parts import Quote, Section, Table
from pipeline.evaluation.table import OF_SCORES, OF_UNIT
from pipeline.metrics import number
from pipeline.tasks import get_task

MEANING = {
    "accuracy": "share of right answers (language models: of next tokens)",
    "f1": "of entities, right where label and both ends are: harmonic mean of precision and recall (without a class O: of words)",
    "precision": "share of the predicted entities that are right",
    "recall": "share of the true entities that are found",
    "macro_f1": "F1, the mean over classes",
    "loss": "mean negative log-likelihood of the truth, nats",
    "perplexity": "exp(loss)",
    "bits_per_byte": "loss in bits a byte of text, comparable between tokenizers",
    "ece": "expected calibration error, 15 bins: how far confidence is from being right",
    "brier": "squared distance of the probabilities from the truth, 0 to 2",
    **OF_SCORES,
}


def sections(report: Report) -> tuple[Section, ...]:
    """The sections below the verdict, in order; sections without content are left out."""
    found = [_quality(report), _fidelity(report), _calibration(report), cost_section(report), _training(report)]
    found += [_determinants(report), _how(report)]
    return tuple(section for section in found if section is not None)


def quality_table(report: Report) -> Table:
    """The teacher, then every student and control, with and without temperature scaling."""
    main, metrics = report.main_metric, [m for m in report.teachers[0].metrics if m != report.main_metric]
    header = ("", "parameters", "seeds", main, "retention", *metrics)
    rows = [_teacher_row(line, main, metrics) for line in report.teachers]
    rows += [_quality_row(report, line, main, metrics) for line in report.quality]
    meaning = {**MEANING, **OF_UNIT.get(position_name(get_task(report.task)), {})}
    notes = [f"{name}: {meaning[name]}" for name in (main, *metrics) if name in meaning]
    kind = "over" if report.higher_is_better else "under"
    notes.append(f"retention: {main} {kind} the teacher's, in percent")
    notes.append(f"in brackets: {_of_intervals(report)}")
    task = get_task(report.task)
    parts = "windows" if task.names == "places" else "masks"
    whole = {"list": "whole lists", "text": f"all {parts} of a text"}.get(resampled_name(task))
    if whole is not None:
        notes.append(f"rows that are resampled are {whole}")
    if report.tokenizer_notes:
        notes.append("-: of tokens that are not the teacher's, and no number to compare")
    caption = f"{report.rows:,} rows, {report.positions:,} {unit(report)} of the split {report.split}"
    return Table(caption, header, tuple(rows), tuple(notes))


def unit(report: Report) -> str:
    """The name of a position in the report's task, such as a word or token."""
    return f"{position_name(get_task(report.task))}s"


def _of_intervals(report: Report) -> str:
    several = [line for line in report.quality if line.num_seeds > 1]
    if not several:
        return "95% intervals by bootstrap over rows; one seed each, so that they say nothing of other seeds"
    return (
        "95% intervals over rows and seeds (bootstrap over rows and variance between seeds, added; t quantiles); "
        "where there is one seed, by bootstrap over rows"
    )


def _teacher_row(line: TeacherLine, main: str, metrics: Sequence[str]) -> tuple[str, ...]:
    return (
        line.name,
        parameters(line.num_parameters),
        "",
        with_interval(line.metrics[main], metric=main),
        "",
        *(_shown(line.metrics, name) for name in metrics),
    )


def _quality_row(report: Report, line: Quality, main: str, metrics: Sequence[str]) -> tuple[str, ...]:
    model = next(m for m in report.models if line.name in (m.name, f"{m.name}, scaled"))
    return (
        line.name,
        "" if line.scaled else parameters(model.num_parameters),
        "" if line.scaled else str(line.num_seeds),
        with_interval(line.metrics[main], metric=main),
        with_interval(line.retention, share=True),
        *(_shown(line.metrics, name) for name in metrics),
    )


def _shown(metrics: object, name: str) -> str:
    assert isinstance(metrics, dict)
    return with_interval(metrics[name], metric=name) if name in metrics else "-"


def _quality(report: Report) -> Section:
    tables = [quality_table(report)]
    several = [line for line in report.quality if line.num_seeds > 1 and not line.scaled]
    if several:
        tables.append(
            Table(
                "Retention by what varies",
                ("", "retention", "over rows", "over seeds", "over both", "seeds"),
                tuple(
                    (line.name, f"{line.retention.value:.1%}", *_three(line.retention), str(line.num_seeds))
                    for line in several
                ),
                (
                    "over rows: other rows of this kind, these students; over seeds: other seeds, these rows (Student's t); over both: variances added",
                ),
            )
        )
    if report.gap_shares:
        tables.append(
            Table(
                "Share of the gap between control and teacher that the student closes",
                ("", "over", "in", "share"),
                tuple(
                    (s.student, s.control, s.metric, "-" if s.share is None else with_interval(s.share, share=True))
                    for s in report.gap_shares
                ),
                ("no figure: the control is not clearly behind the teacher, so that there is no gap to close",),
            )
        )
    if report.comparisons:
        tables.append(_comparison_table(report))
    return Section("quality", "Quality", report.tokenizer_notes, (*tables, _who(report)), ("quality", "pareto"))


def _comparison_table(report: Report) -> Table:
    rows = [
        (
            f"{item.first} - {item.second}",
            item.metric,
            _difference(item.metric, item.difference),
            item.test,
            p_value(item.p_value),
            p_value(item.p_adjusted),
            "" if item.p_seeds is None else p_value(item.p_seeds),
        )
        for item in report.comparisons
    ]
    return Table(
        "Paired comparisons, on the same rows",
        ("", "in", "gain", "test", "p", "p, Holm", "p over seeds"),
        tuple(rows),
        (
            "gain: above 0, the first is better; "
            + (
                "bits a byte, each row taken with the bytes that the second predicts of it"
                if report.tokenizer_notes
                else f"points of {_points(report)}, nats of loss"
            ),
            *_untested(report),
            "p, Holm: adjusted for the number of comparisons in this table; p over seeds: paired t-test, not adjusted",
        ),
    )


def _points(report: Report) -> str:
    """The names of compared metrics that are shares."""
    shares = dict.fromkeys(item.metric for item in report.comparisons if number(item.metric, 0.5).endswith("%"))
    return " and ".join(shares) or "accuracy"


def _untested(report: Report) -> tuple[str, ...]:
    """Why some lines have no test."""
    metrics = dict.fromkeys(item.metric for item in report.comparisons if item.test == "none")
    if not metrics or report.tokenizer_notes:
        return ()
    return (
        f"none: the models' {' and '.join(metrics)} are shares of different numbers of predictions, so that no sum over rows can be tested; see the interval",
    )


def _three(found: Measured) -> tuple[str, ...]:
    return tuple(
        "-" if interval is None else f"{interval.low:.1%} to {interval.high:.1%}"
        for interval in (found.rows, found.seeds, found.both)
    )


def _difference(metric: str, found: Measured) -> str:
    points = number(metric, 0.5).endswith("%")
    scale, form = (100, "+.1f") if points else (1, "+.3f")
    if math.isnan(found.value):
        return "-"
    interval = found.interval
    return f"{scale * found.value:{form}}" + (
        "" if interval is None else f" ({scale * interval.low:{form}} to {scale * interval.high:{form}})"
    )


def _who(report: Report) -> Table:
    rows = [(model.name, model.role, model.architecture, model.made_by or "-") for model in report.models]
    return Table("Who is who", ("", "", "architecture", "trained on"), tuple(rows))


def _fidelity(report: Report) -> Section:
    is_score = get_task(report.task).target == "score"
    rows: list[tuple[str, ...]] = [
        (
            line.name,
            with_interval(line.agreement, share=not is_score),
            number("agreement", line.on_right),
            number("agreement", line.on_errors),
            number("agreement", line.mended),
            "-" if line.kl is None else with_interval(line.kl),
            "-" if line.js is None else with_interval(line.js),
        )
        for line in report.closeness
    ]
    header: tuple[str, ...] = (
        *("", "agreement", "where the teacher is right", "where it errs", "mends its errors"),
        *("KL", "JS"),
    )
    if is_score:
        header = ("", "agreement", "distance")
        rows = [(*row[:2], row[5]) for row in rows]
    tables = [Table("Agreement with the teacher", header, tuple(rows), (report.divergence_note,))]
    if report.slices:
        tables += _slice_tables(report)
    quotes = tuple(
        Quote(
            f"source row {item.source_row}, {_apart(item, is_score=is_score)}",
            item.text,
            (("truth", item.truth or "not labelled"), ("teacher", item.teacher), (item.student, item.answer)),
        )
        for item in report.examples
    )
    hidden = any(item.text is None for item in report.examples)
    text = ["Texts are not shown: the cache was made without them."] if hidden else []
    if quotes:
        text.append(
            f"At the end: where {report.examples[0].student} (first seed) and its teacher differ most"
            + ("." if report.examples[0].is_kl else ", by the probability of the teacher's most likely class.")
        )
    return Section(
        "fidelity", "Fidelity: does it say what its teacher says?", tuple(text), tuple(tables), ("fidelity",), quotes
    )


def _apart(item: Example, *, is_score: bool) -> str:
    """Format the distance between student and teacher at a position."""
    if is_score:
        return f"{item.distance:.2f} squared standard deviations apart"
    return f"{item.distance:.2f} nats apart" + ("" if item.is_kl else " on the teacher's most likely class")


def _slice_tables(report: Report) -> list[Table]:
    names = tuple(line.name for line in report.slices[0].models)
    tables = []
    for field, caption in (("accuracy", "Accuracy"), ("agreement", "Agreement"), ("kl", "KL, nats,")):
        of_teacher = field == "accuracy"
        rows = []
        for item in report.slices:
            values = [getattr(line, field) for line in item.models]
            shown = ["-" if value is None else number(field, value) for value in values]
            teacher = [number(field, item.teacher_accuracy)] if of_teacher else []
            rows.append((item.name, f"{item.positions:,}", *teacher, *shown))
        if any(getattr(line, field) is not None for line in report.slices[0].models):
            header = (report.slice_kind.partition(",")[0], unit(report), *(["teacher"] if of_teacher else []), *names)
            tables.append(Table(f"{caption} by {report.slice_kind}", header, tuple(rows)))
    return tables


def _calibration(report: Report) -> Section | None:
    if not report.calibrations:
        return None
    rows = [
        (
            line.name,
            "" if line.temperature is None else f"{line.temperature:.2f}",
            number("ece", line.ece),
            "-" if line.brier is None else with_interval(line.brier),
            "-" if line.nll is None else with_interval(line.nll),
        )
        for line in report.calibrations
    ]
    table = Table("How far the probabilities can be believed", ("", "temperature", "ECE", "Brier", "NLL"), tuple(rows))
    text = (
        f"Temperature scaling divides the logits by one number, {report.calibration}; the predictions stay as they are. "
        "In the diagrams: points by bins of confidence with at least 5 predictions, bars how many stand there, dotted with temperature scaling.",
    )
    return Section("calibration", "Calibration", text, (table,), ("reliability",))


def _training(report: Report) -> Section | None:
    if not any(run.history for model in report.models for run in model.runs):
        return None
    text = (
        "Losses a token are left out, since the models have different tokens; paler lines are further seeds."
        if report.tokenizer_notes
        else f"Both terms of the loss {'in squared standard deviations' if get_task(report.task).target == 'score' else 'at the scale of cross-entropy'}, as they were logged; paler lines are further seeds.",
    )
    return Section("training", "Training", text, (), ("training",))


def _determinants(report: Report) -> Section | None:
    if sum(model.role == "student" for model in report.models) < 2:
        return None
    answered = {item.question for item in report.determinants}
    open_questions = " ".join(question for question in QUESTIONS if question not in answered)
    metric = report.main_metric
    tables = []
    for item in report.determinants:
        rows = [
            (
                level.value,
                str(len(level.students)),
                number(metric, level.mean),
                f"{number(metric, level.low)} to {number(metric, level.high)}",
                f"{level.retention:.1%}",
            )
            for level in item.levels
        ]
        caption = f"{item.question} By {item.factor}: {number(metric, item.spread)} between best and worst"
        tables.append(Table(caption, (item.factor, "students", metric, "range", "retention"), tuple(rows)))
    text = (
        "Means over the students that share a value, whatever else they differ in: main effects where every combination was trained, to be read with care where not.",
        f"Not answered here, since all students are alike in it: {open_questions}" if open_questions else "",
    )
    return Section("determinants", "What decides?", text, tuple(tables), ("determinants",))


def _how(report: Report) -> Section:
    caches = "; ".join(f"{t.name}: {t.cache}, cache {t.cache_id[:16]}" for t in report.teachers)
    best = next(line for line in report.quality if line.name == report.verdict.student)
    each = resampled_name(get_task(report.task))
    text = (
        f"Task {report.task}, encoding {report.encoding}. {caches}. Teachers' figures come from the caches; no teacher was loaded for them.",
        f"The answer is about {report.verdict.student}, {report.verdict.chosen}; {uncertainty(best.retention, best.num_seeds)}.",
        f"Intervals resample {each}s, all models together, since {unit(report)} of one {each} depend on each other and a {each} that is hard is hard for all.",
    )
    return Section("how", "How this was measured", text)
