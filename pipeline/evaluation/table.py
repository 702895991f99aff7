"""Format an evaluation as a table for the terminal, with an explanation of each column."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.cache.views.units import a_position, position_name, resampled_name
from pipeline.metrics import number
from pipeline.records import EvaluationReport, ModelEvaluation
from pipeline.tasks import get_task

#: Explanations of metrics of scores.
OF_SCORES = {
    "ndcg@10": "normalised discounted cumulative gain of the first 10, the mean over lists with a relevant row",
    "mrr": "1 over the place of the first relevant row (label above 0), the mean over the same lists",
    "pearson": "correlation with the labels, the mean over outputs",
    "spearman": "correlation of the ranks",
    "mse": "mean squared error, in squared units of the labels",
}

_MEANING = {
    "accuracy": "share of right answers (language models: of next tokens)",
    "f1": "of entities, right where label and both ends are: harmonic mean of precision and recall (without a class O: of words)",
    "precision": "share of the predicted entities that are right",
    "recall": "share of the true entities that are found",
    "macro_f1": "F1, the mean over classes",
    "loss": "mean negative log-likelihood of the truth, nats",
    "perplexity": "exp(loss)",
    "bits_per_byte": "loss in bits a byte of text, comparable between tokenizers",
    "ece": "expected calibration error: how far confidence is from being right",
    "chrf": "of the texts that the model writes, compared with the data's: F-score of runs of characters, 0 to 100",
    **OF_SCORES,
}


#: Explanations that differ where positions are words, labels, or the ends of answers.
OF_UNIT = {
    "end": {
        "f1": "of the tokens of each row's answer and the true one, the mean over rows",
        "exact": "share of answers whose first and last token are right",
        "accuracy": "share of ends that are right",
        "loss": "mean negative log-likelihood of the true ends, nats",
    },
    "word": {"accuracy": "share of words with the right class"},
    "label": {
        "f1": "of all labels together (micro): harmonic mean of precision and recall",
        "macro_f1": "F1, the mean over labels",
        "average_precision": "area under precision over recall, the mean over labels",
        "accuracy": "share of labels that are right, those that a row has not included",
        "ece": "expected calibration error of the probability of a label, the mean over labels",
    },
}


def format_table(report: EvaluationReport) -> str:
    """Format a report as text: one line per model, the teacher first."""
    metrics = list(dict.fromkeys(name for line in (report.teacher, *report.students) for name in line.metrics))
    kept = ["retention", "95% interval"] if metrics else []
    task = get_task(report.task)
    is_score = task.target == "score"
    header = ["", "parameters", "size", *metrics, "agreement", "distance" if is_score else "KL", *kept]
    lines = [
        header,
        *(_cells(line, metrics, is_score=is_score)[: len(header)] for line in (report.teacher, *report.students)),
    ]
    table = "\n".join(aligned(lines))
    unit = position_name(task)
    meaning = {**_MEANING, **OF_UNIT.get(unit, {})}
    notes = [f"{name}: {meaning[name]}" for name in metrics if name in meaning]
    notes.append("size: the teacher's parameters over the model's")
    if is_score:
        notes += [
            "agreement: correlation with the teacher's scores",
            "distance: mean squared difference from the teacher's scores, in their standard deviations",
        ]
    else:
        notes += [
            f"agreement: share of {unit}s where the model's most likely class is the teacher's",
            f"KL: KL(teacher || model) at temperature {report.temperature:g}, nats {a_position(task)}",
        ]
    if metrics:
        notes.append(
            f"retention: {report.main_metric} kept of the teacher's; interval by bootstrap over {resampled_name(task)}s"
        )
    else:
        notes.append("the split has no hard labels: students are compared with the teacher alone")
    title = f"{report.task}, split {report.split}: {report.rows} rows, {report.positions} {unit}s"
    if report.labelled is not None and report.labelled < report.positions:
        title += f", {report.labelled} labelled"
    parts = [title, table, "\n".join(f"  {note}" for note in notes)]
    for continuation in report.continuations:
        width = max(map(len, continuation.texts))
        spoken = [f"  {name.ljust(width)}  {' '.join(text.split())}" for name, text in continuation.texts.items()]
        parts.append("\n".join([f"{continuation.prompt!r} continues:", *spoken]))
    return "\n\n".join(parts)


def aligned(lines: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Align rows of cells: the first `left` columns flush left, the others flush right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _cells(line: ModelEvaluation, metrics: list[str], *, is_score: bool) -> list[str]:
    interval = line.retention_interval
    return [
        line.name,
        f"{line.num_parameters / 1e6:.1f}M" if line.num_parameters >= 1e5 else f"{line.num_parameters or ''}",
        "" if line.size_ratio is None else f"{line.size_ratio:.1f}x",
        *(number(name, line.metrics.get(name, math.nan)) for name in metrics),
        "" if line.agreement is None else f"{line.agreement:.3f}" if is_score else f"{line.agreement:.1%}",
        "" if line.kl is None else f"{line.kl:.3f}",
        "" if line.retention is None else f"{line.retention:.1%}",
        "" if interval is None else f"{interval.low:.1%} to {interval.high:.1%}",
    ]
