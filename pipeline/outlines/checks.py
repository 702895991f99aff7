"""The `--dry-run` of verify, audit and report: what they would read and write."""

from __future__ import annotations

from pathlib import Path

from pipeline.cache.format.manifest import load_manifest
from pipeline.capture.audit import check_teacher, choose_rows, open_both
from pipeline.capture.forward import device_name
from pipeline.config import AuditConfig, ReportConfig, VerifyConfig
from pipeline.evaluation.measures.calibration import calibration_split
from pipeline.evaluation.measures.runs import asked_models
from pipeline.evaluation.report.figures import require_matplotlib
from pipeline.evaluation.report.report import check_new, open_teachers, read_by
from pipeline.progress import size
from pipeline.records import Outline
from pipeline.tasks import get_task
from pipeline.training.student import load_student


def outline_verify(config: VerifyConfig) -> Outline:
    """Describe what `verify` would read.

    Raises:
        CacheError: there is no finished cache.
    """
    shards = load_manifest(Path(config.cache)).shards
    decoded = "nothing is decoded" if config.quick else f"{sum(shard.rows for shard in shards):,} rows are decoded"
    total = size(sum(shard.bytes for shard in shards))
    return (
        ("reads", f"{config.cache}: {len(shards):,} shards, {total}; {decoded}"),
        ("writes", "nothing; removes the shards that are broken" if config.repair else "nothing"),
    )


def outline_audit(config: AuditConfig) -> Outline:
    """Describe an audit, after loading the teacher and comparing it with the manifest.

    Raises:
        PipelineError: as in `run`.
    """
    cache, teacher = open_both(config)
    contract = cache.manifest.contract
    check_teacher(contract, teacher)
    rows = choose_rows(cache, config.rows, config.seed)
    parameters = sum(p.numel() for p in teacher.model.parameters())
    return (
        ("reads", f"{config.cache}: {len(rows):,} rows, {sum(row.example.num_tokens for row in rows):,} tokens"),
        (
            "teacher",
            f"{config.teacher}: {parameters:,} parameters, {contract.teacher.dtype}, on {device_name(teacher)}",
        ),
        ("passes", "two of each row: in its batch, and alone"),
        ("writes", f"a report in {Path(config.cache, 'reports')}"),
    )


def outline_report(config: ReportConfig) -> Outline:
    """Describe a report, after loading each student and checking that it fits.

    The labels and the teacher's predictions are read.

    Raises:
        PipelineError: as in `report`.
    """
    check_new(Path(config.output), overwrite=config.overwrite)
    require_matplotlib()
    asked = asked_models(config.student, config.control)
    teachers = open_teachers(config.cache, config.split)
    first = next(iter(teachers.values()))
    task = get_task(first.cache.manifest.contract.task)
    fitted_on = calibration_split(first.cache, task, config.calibration_split, config.split)
    lines = [
        ("reads", f"{', '.join(config.cache)}: {config.split}, {first.seen.num_rows:,} rows"),
        ("calibration", f"on {fitted_on}" if fitted_on else f"crosswise on halves of {config.split}"),
    ]
    for item in asked:
        contracts = [read_by(path, teachers, config.split)[1].manifest.contract for path in item.directories]
        pairs = zip(contracts, item.directories, strict=True)
        models = [load_student(contract, path, new_head=False).model for contract, path in pairs]
        parameters = sum(p.numel() for p in models[0].parameters())
        lines.append((item.name, f"{item.role}: {parameters:,} parameters; {', '.join(item.directories)}"))
    rounds = f"{config.rounds} rounds of latency, memory and energy" if config.rounds else "no costs are measured"
    return (
        *lines,
        ("costs", rounds),
        ("writes", f"report.html, report.md, report.json and figures in {config.output}"),
    )
