"""Target texts that encoder-decoders write, compared with those of the data by chrF."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pipeline.cache import Cache
from pipeline.models import LoadedModel, pad_id
from pipeline.models.predict import write_targets
from pipeline.progress import track
from pipeline.records import EvaluationReport, ModelEvaluation
from pipeline.tasks import get_task
from pipeline.training.student import load_student

#: Tokens that a model may write beyond the longest target of the rows.
_MORE = 16


def with_chrf(
    report: EvaluationReport,
    cache: Cache,
    students: Mapping[str, str],
    teacher: str | None,
    rows: int,
    *,
    base_models: Mapping[str, str] | None = None,
) -> EvaluationReport:
    """Add `chrf` to models that write target texts; other reports are returned unchanged.

    Args:
        students: name, as in the report, -> directory or hub name.
        teacher: the same of the teacher; None: it is not loaded, and has no `chrf`.
        rows: of the split, the first ones.
    """
    if get_task(report.task).label_source != "target" or not rows:
        return report

    def scored(line: ModelEvaluation, path: str, base: str | None = None) -> ModelEvaluation:
        model = load_student(cache.manifest.contract, path, new_head=False, base_model=base)
        found = chrf(cache, model, line.name, report.split, rows)
        return dataclasses.replace(line, metrics={**line.metrics, "chrf": found})

    bases = base_models or {}
    return dataclasses.replace(
        report,
        teacher=report.teacher if teacher is None else scored(report.teacher, teacher),
        students=tuple(scored(line, students[line.name], bases.get(line.name)) for line in report.students),
    )


def chrf(cache: Cache, model: LoadedModel, name: str, split: str, rows: int) -> float:
    """ChrF (Popovic, 2015; sacrebleu) in [0, 100] of greedy texts for the first rows."""
    from sacrebleu import corpus_chrf

    task, dataset = get_task(cache.manifest.contract.task), cache.dataset(split)
    count = min(rows, len(dataset))
    written, expected = [], []
    size = task.default_eval_rows
    starts = range(0, count, size)
    for start in track(starts, f"write {name}", len(starts), unit="step"):
        batch = [dataset[i].example for i in range(start, min(start + size, count))]
        inputs, _ = task.collate(batch, pad_id(model.tokenizer, model.model))
        labels = [example.labels for example in batch if example.labels is not None]
        written += write_targets(model, inputs, max(map(len, labels)) + _MORE)
        expected += model.tokenizer.batch_decode([each.tolist() for each in labels], skip_special_tokens=True)
    return float(corpus_chrf(written, [[text.strip() for text in expected]]).score)
