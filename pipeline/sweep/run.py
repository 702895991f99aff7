"""Run `softlabel sweep`: train all students in one process, one after another.

Each cache is opened once. Finished runs are not repeated.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from pipeline.cache import Cache
from pipeline.cache.format.manifest import dump, parse
from pipeline.cache.storage.commit import write_text
from pipeline.config import ReportConfig, SweepConfig, TrainStudentConfig
from pipeline.errors import CacheError, MisuseError, PipelineError
from pipeline.evaluation import evaluate
from pipeline.evaluation.report.report import report as write_report
from pipeline.evaluation.report.summary import summary
from pipeline.models.arguments import training_arguments
from pipeline.models.initialize import make_student
from pipeline.models.saved import checkpoints
from pipeline.progress import duration
from pipeline.records import Outline, TrainResult
from pipeline.sweep.grid import PlannedRun, Start, named_caches, plan, train_config
from pipeline.sweep.leaderboard import SweepReport, SweepRun, make_report
from pipeline.tasks import get_task
from pipeline.training.run import run as train
from pipeline.workflow import content_of

logger = logging.getLogger(__name__)

#: The file that the sweep writes next to a model: hashes of what it was made from, and of its last
#: file once it is finished.
_MARK = ".sweep.json"
#: The file that a training run writes last.
_PROOF = "distillation.json"


def run(config: SweepConfig) -> SweepReport:
    """Run all unfinished runs of a sweep in order, and write `sweep.json` after each.

    Raises:
        MisuseError: several ranks, or two caches or students of the same name.
        CacheError: a cache does not exist, or lacks a split. A failed run is recorded instead of
            raised.
    """
    caches, eval_split, runs = _planned(config)
    task = get_task(next(iter(caches.values())).manifest.contract.task)
    teachers = _teachers(caches, eval_split)
    found: list[SweepRun] = []
    for number, planned in enumerate(runs, start=1):
        seconds = [each.result.seconds for each in found if each.result is not None]
        left = f", at most about {duration(fmean(seconds) * (len(runs) - number + 1))} left" if seconds else ""
        logger.info("sweep %d/%d: %s%s", number, len(runs), planned.name, left)
        found.append(_run_one(config, planned, caches[planned.cache]))
        write_text(Path(config.output, "sweep.json"), dump(make_report(config, task, found, teachers, eval_split)))
        gc.collect()  # trainer and model are a reference cycle
    return make_report(config, task, found, teachers, eval_split)


def _planned(config: SweepConfig) -> tuple[dict[str, Cache], str | None, tuple[PlannedRun, ...]]:
    """Return the caches by name, the split to choose on, and the runs in order."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MisuseError("sweep runs in one process; under torchrun, train its students with train-student")
    caches = {name: Cache.open(path) for name, path in named_caches(config).items()}
    return caches, _check(config, caches), plan(config, list(caches))


def outline(config: SweepConfig) -> Outline:
    """Describe each run, and whether it is finished; write nothing.

    Raises:
        PipelineError: as in `run`, except for errors of single runs.
    """
    caches, eval_split, runs = _planned(config)
    training_arguments(config.output, config.training, report_to=config.report_to)  # refuses invalid settings
    lines = [("reads", f"{cache.where}: {config.split}") for cache in caches.values()]
    lines += [
        ("chosen on", eval_split or "nothing: no cache has a split validation"),
        ("reported on", config.report_split),
    ]
    seconds = []
    for planned in runs:
        result = _finished_before(config, planned, caches[planned.cache])
        lines.append((planned.name, "to be trained" if result is None else f"is finished ({result.seconds:.0f} s)"))
        seconds += [] if result is None else [result.seconds]
    left = len(runs) - len(seconds)
    lines.append(("writes", f"{config.output}: {left:,} of {len(runs):,} students, sweep.json and the report"))
    if seconds and left:
        lines.append(("time", f"about {duration(fmean(seconds) * left)}, as the runs that are finished took"))
    return tuple(lines)


def _finished_before(config: SweepConfig, planned: PlannedRun, cache: Cache) -> TrainResult | None:
    """Return the result of a run, or None if it is unfinished or its student is not made yet."""
    start = planned.start
    student = Path(start.path) if start.path is not None else _start_directory(config, start, planned.seed)
    if start.path is None and not _is_finished(student, _start_key(config, start, planned.seed), "config.json"):
        return None
    settings = train_config(config, planned, cache=str(cache.root), student=str(student))
    directory = Path(settings.output)
    return parse(TrainResult, directory / _PROOF) if _is_finished(directory, _key(settings, cache), _PROOF) else None


def report(config: SweepConfig, found: SweepReport) -> str:
    """Write the final report of a sweep to the directory `report`: all students, without timings.

    It is that of `softlabel report`.

    Returns:
        Its summary; empty if no student was trained.
    """
    made = [(run.role, f"{run.group}={Path(config.output, run.directory)}") for run in found.runs if run.result]
    students, controls = (tuple(model for role, model in made if role == kind) for kind in ("student", "control"))
    if not students:
        return ""
    return summary(
        write_report(
            ReportConfig(
                cache=tuple(named_caches(config).values()),
                student=students,
                control=controls,
                teacher=config.teacher,
                split=config.report_split,
                calibration_split=config.eval_split,
                output=str(Path(config.output, "report")),
                rounds=0,
                overwrite=True,
            )
        )
    )


def _check(config: SweepConfig, caches: Mapping[str, Cache]) -> str | None:
    """Return the split to choose on, or None, after checks that apply to all runs and the report.

    Raises:
        CacheError: a cache lacks a split.
        MisuseError: the split to choose on is the one to report, or matplotlib is missing.
    """
    for name, cache in caches.items():
        for flag, split in (
            ("--split", config.split),
            ("--eval-split", config.eval_split),
            ("--report-split", config.report_split),
        ):
            if split is not None and split not in cache.splits:
                raise CacheError(
                    f"{cache.where}: no split {split!r} for {flag}; the cache {name} has {', '.join(cache.splits)}"
                )
    if importlib.util.find_spec("matplotlib") is None:
        raise MisuseError(
            "sweep ends in a report, which draws with matplotlib: pip install 'soft-label-pipeline[report]'"
        )
    everywhere = all("validation" in cache.splits for cache in caches.values())
    eval_split = config.eval_split or ("validation" if everywhere else None)
    if eval_split == config.report_split:
        raise MisuseError(
            f"--report-split {config.report_split}: is the split that the best is chosen on, so its figures would be too good; report on another"
        )
    return eval_split


def _teachers(caches: Mapping[str, Cache], eval_split: str | None) -> dict[str, Mapping[str, float]]:
    """Return each teacher's metrics on the split to choose on, if it has labels."""
    found: dict[str, Mapping[str, float]] = {}
    for name, cache in caches.items():
        if eval_split is not None:
            metrics = evaluate(cache, {}, split=eval_split).teacher.metrics
            if metrics:
                found[name] = metrics
    return found


def _run_one(config: SweepConfig, planned: PlannedRun, cache: Cache) -> SweepRun:
    """Train one student unless it is finished; an error of this run alone is recorded."""
    record = SweepRun(
        name=planned.name,
        group=planned.group,
        role=planned.role,
        cache=planned.cache,
        cache_id=cache.manifest.cache_id,
        student=planned.start.name,
        seed=planned.seed,
        loss=planned.loss,
        teacher_labels=planned.teacher_labels,
        directory=planned.directory.as_posix(),
    )
    try:
        student = _begin(config, planned.start, planned.seed)
        settings = train_config(config, planned, cache=str(cache.root), student=student)
        result = _trained(settings, cache)
    except (PipelineError, torch.OutOfMemoryError) as error:
        logger.warning("%s: failed: %s", planned.name, error)
        return dataclasses.replace(record, error=" ".join(str(error).split()))
    return dataclasses.replace(record, result=dataclasses.replace(result, output=record.directory))


def _begin(config: SweepConfig, start: Start, seed: int) -> str:
    """Return the path of a student's initial weights, after making them if necessary.

    A shape has other weights for each seed; layers of the teacher are the same for all.
    """
    if start.path is not None:
        return start.path
    teacher = str(config.teacher)
    directory, key = _start_directory(config, start, seed), _start_key(config, start, seed)
    if not _is_finished(directory, key, "config.json"):
        make_student(teacher, directory, config=start.shape, layers=start.layers or None, seed=seed)
        _set_mark(directory, key, "config.json")
    return str(directory)


def _start_directory(config: SweepConfig, start: Start, seed: int) -> Path:
    return Path(config.output, "starts", f"{start.name}-seed{seed}" if start.shape else start.name)


def _start_key(config: SweepConfig, start: Start, seed: int) -> str:
    return _hash([content_of(Path(str(config.teacher))), dataclasses.asdict(start), seed if start.shape else None])


def _trained(settings: TrainStudentConfig, cache: Cache) -> TrainResult:
    """Return the result of a run: read if it is finished, else of a resumed or new training."""
    directory = Path(settings.output)
    key = _key(settings, cache)
    if _is_finished(directory, key, _PROOF):
        logger.info("%s is finished", directory)
        return parse(TrainResult, directory / _PROOF)
    resume = _mark(directory) == {"key": key, "proof": None} and bool(checkpoints(directory))
    _set_mark(directory, key)
    result = train(dataclasses.replace(settings, resume=resume, overwrite=not resume), cache)
    for checkpoint in checkpoints(directory):  # no longer needed, and each three times the student's size
        shutil.rmtree(checkpoint)
    _set_mark(directory, key, _PROOF)
    return result


def _key(settings: TrainStudentConfig, cache: Cache) -> str:
    """Return a hash of everything that determines a run."""
    apart = ("cache", "student", "output", "resume", "overwrite", "report_to")
    plain = {k: v for k, v in dataclasses.asdict(settings).items() if k not in apart}
    return _hash([plain, cache.manifest.cache_id, content_of(Path(settings.student))])


def _is_finished(directory: Path, key: str, proof: str) -> bool:
    """Return whether a directory was finished from the same inputs, and not changed since."""
    return (directory / proof).is_file() and _mark(directory) == {"key": key, "proof": content_of(directory / proof)}


def _mark(directory: Path) -> Any:
    try:
        return json.loads((directory / _MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _set_mark(directory: Path, key: str, proof: str | None = None) -> None:
    mark = {"key": key, "proof": None if proof is None else content_of(directory / proof)}
    write_text(directory / _MARK, json.dumps(mark) + "\n")


def _hash(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
