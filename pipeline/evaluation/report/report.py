"""`softlabel report`: does the student perform as well as its teacher?

Runs all measurements and writes the files of the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.cache import Cache
from pipeline.cache.format.manifest import dump
from pipeline.cache.storage.commit import write_atomically, write_text
from pipeline.config import ReportConfig
from pipeline.cross_tokenizer.opening import cache_for
from pipeline.errors import CacheError, ContractError, MisuseError
from pipeline.evaluation.basis import Basis
from pipeline.evaluation.measures.calibration import calibration_line, calibration_split, fit_temperatures
from pipeline.evaluation.measures.cost import Candidate, break_even, measure_costs
from pipeline.evaluation.measures.determinants import determinants
from pipeline.evaluation.measures.fidelity import closeness, examples, slices
from pipeline.evaluation.measures.observation import Observation, divergence_note, observe, observe_teacher
from pipeline.evaluation.measures.quality import comparisons, gap_shares, quality_lines, teacher_line
from pipeline.evaluation.measures.runs import Asked, asked_models, describe_model, provenance
from pipeline.evaluation.measures.scores import Scores
from pipeline.evaluation.measures.subjects import Subject, Teacher
from pipeline.evaluation.measures.tokenizers import tokenizer_notes
from pipeline.evaluation.records import Calibration, Cost, Machine, Model, Report
from pipeline.evaluation.report.figures import Picture, draw_all
from pipeline.evaluation.report.page import make_markdown, make_page
from pipeline.evaluation.report.verdict import headline, verdict
from pipeline.models.doubts import warn_of_doubts
from pipeline.softlabels import served_temperature
from pipeline.sources.files.loading import redact
from pipeline.tasks import get_task
from pipeline.training.student import load_student


def report(config: ReportConfig) -> Report:
    """Compare students and controls with their teachers, and write the report.

    Returns:
        The content of `report.json`; `report.html`, `report.md` and figures are written next to it.

    Raises:
        MisuseError: names clash, matplotlib is missing, or the output directory holds a report.
        CacheError: a split does not exist or has no label.
        ContractError: the caches have different tasks or rows.
        PipelineError: a student does not fit its cache.
    """
    check_new(Path(config.output), overwrite=config.overwrite)
    asked = asked_models(config.student, config.control)
    teachers = open_teachers(config.cache, config.split)
    first = next(iter(teachers.values()))
    contract = first.cache.manifest.contract
    task = get_task(contract.task)
    fitted_on = calibration_split(first.cache, task, config.calibration_split, config.split)
    views = {path: read_by(path, teachers, config.split) for item in asked for path in item.directories}
    basis = Basis(task, in_bytes=any(cache.vocabulary_map is not None for _, cache in views.values()))
    subjects = [look(item, basis, views, teachers, config, fitted_on) for item in asked]
    scores = Scores(basis, _observed(teachers.values(), subjects), resamples=config.resamples, seed=config.seed)
    chosen, how = headline(basis, subjects, fitted_on)
    shares = gap_shares(basis, subjects, scores)
    slice_kind, sliced = slices(task, subjects, first.cache, first.seen)
    costs, machine = _costs(config, teachers, subjects, basis)
    found = Report(
        task=task.name,
        split=config.split,
        rows=first.seen.num_rows,
        positions=len(first.seen.predictions.labels),
        main_metric=basis.main_metric,
        higher_is_better=basis.higher_is_better,
        encoding=contract.encoding.kind,
        temperature=served_temperature(contract.encoding),
        calibration=(
            f"fitted on the split {fitted_on}"
            if fitted_on
            else f"fitted crosswise: on half of the split {config.split} for the other half"
        ),
        verdict=verdict(basis, chosen, how, subjects, shares, scores, split=config.split),
        teachers=tuple(teacher_line(basis, teacher, scores) for teacher in teachers.values()),
        models=tuple(subject.model for subject in subjects),
        quality=quality_lines(basis, subjects, scores),
        comparisons=comparisons(basis, subjects, chosen, scores, seed=config.seed),
        gap_shares=shares,
        closeness=tuple(closeness(subject, scores) for subject in subjects),
        divergence_note=divergence_note(contract),
        slices=sliced,
        slice_kind=slice_kind,
        examples=examples(task, chosen, config.split, config.examples),
        calibrations=() if task.target == "score" else _calibrations(teachers.values(), subjects, scores),
        costs=costs,
        machine=machine,
        break_even=tuple(
            item
            for teacher in teachers.values()
            if (item := break_even(teacher.name, teacher.cache, [run for s in subjects for run in s.model.runs]))
        ),
        determinants=determinants(basis, subjects, scores),
        tokenizer_notes=tokenizer_notes(subjects),
        doubts=tuple(
            line
            for name, seen in (
                *((teacher.name, teacher.seen) for teacher in teachers.values()),
                *((subject.name, subject.seen[0]) for subject in subjects),
            )
            for line in warn_of_doubts(seen.predictions, name, config.split)
        ),
    )
    write(found, draw_all(found), Path(config.output))
    return found


def check_new(output: Path, *, overwrite: bool) -> None:
    """Check that no report would be replaced, before measurements that may take hours.

    Raises:
        MisuseError: `output` holds a report and `overwrite` is not set.
    """
    found = [name for name in ("report.json", "report.html", "report.md") if (output / name).exists()]
    if found and not overwrite:
        raise MisuseError(
            f"--output {output}: holds a report ({', '.join(found)}); use another, or --overwrite to replace it"
        )


def open_teachers(caches: Sequence[str], split: str) -> dict[str, Teacher]:
    """Map each cache_id to the teacher of that cache, observed on the split.

    All caches must have the same rows and labels in the split.

    Raises:
        CacheError: the split does not exist or has no label.
        ContractError: caches differ in task or rows.
        MisuseError: a cache is given twice.
    """
    found: dict[str, Teacher] = {}
    for i, path in enumerate(caches):
        cache = Cache.open(path)
        if cache.manifest.cache_id in found:
            raise MisuseError(f"--cache {redact(str(path))}: is given twice")
        task = get_task(cache.manifest.contract.task)
        seen = observe_teacher(cache, task, split)
        if not seen.labelled.any():
            raise CacheError(
                f"{redact(str(path))}: split {split} has no hard label to report against; choose another --split ({', '.join(cache.splits)})"
            )
        first = next(iter(found.values()), None)
        if first is not None:
            _check_same(first, cache, seen, path)
        name = "teacher" if i == 0 else f"teacher {Path(path).name}"
        if any(teacher.name == name for teacher in found.values()):
            name = f"teacher {i + 1}"
        found[cache.manifest.cache_id] = Teacher(name, cache, seen)
    return found


def read_by(directory: str, teachers: Mapping[str, Teacher], split: str) -> tuple[Teacher, Cache]:
    """The teacher to compare a model with, and that teacher's cache as the model reads it.

    The teacher is the one the model was trained with, if it is among `teachers`.

    Raises:
        ContractError: the model's tokenizer cannot be aligned with the teacher's.
    """
    own = teachers.get(provenance(directory, {}).cache_id or "", next(iter(teachers.values())))
    return own, cache_for(own.cache, directory, split, teaches=False)


def look(
    item: Asked,
    basis: Basis,
    views: Mapping[str, tuple[Teacher, Cache]],
    teachers: Mapping[str, Teacher],
    config: ReportConfig,
    fitted_on: str | None,
) -> Subject:
    """Evaluate every seed of a model, on the calibration split and then on the reported split.

    Each seed is loaded once.

    Args:
        views: directory -> teacher and cache, from `read_by`.

    Raises:
        MisuseError: the seeds have different tokenizers.
    """
    task = basis.task
    caches = {cache_id: teacher.cache for cache_id, teacher in teachers.items()}
    runs = sorted(
        ((provenance(directory, caches), directory) for directory in item.directories),
        key=lambda pair: -1 if pair[0].seed is None else pair[0].seed,
    )
    own, cache = views[runs[0][1]]
    _check_seeds(item, [views[directory][1] for _, directory in runs])
    batch_size = config.batch_size or task.default_eval_rows
    seen, scaled, fits = [], [], []
    described, num_parameters = "", 0
    for run, directory in runs:
        label = item.name if len(runs) == 1 else f"{item.name} (seed {run.seed})"
        loaded = load_student(cache.manifest.contract, directory, new_head=False)
        described = describe_model(loaded.model)
        if cache.vocabulary_map is not None:
            described = f"{described}, its own tokenizer of {len(loaded.tokenizer):,} tokens"
        num_parameters = sum(p.numel() for p in loaded.model.parameters())
        fit = fit_temperatures(cache, basis, loaded, label, config.split, fitted_on, batch_size)
        plain, with_scaling = observe(cache, task, loaded, label, config.split, batch_size, fit.row_temperatures)
        seen.append(plain)
        scaled.extend([] if with_scaling is None else [with_scaling])
        fits.append(fit)
    by_choice = [fit.main_metric for fit in fits if fit.main_metric is not None]
    return Subject(
        model=Model(
            name=item.name,
            role=item.role,
            architecture=described,
            num_parameters=num_parameters,
            cache_id=cache.manifest.cache_id,
            runs=tuple(run for run, _ in runs),
        ),
        teacher=own,
        cache=cache,
        seen=tuple(seen),
        scaled=tuple(scaled),
        temperatures=tuple(
            float("nan") if fit.row_temperatures is None else float(fit.row_temperatures.mean()) for fit in fits
        ),
        chosen_by=float(np.mean(by_choice)) if len(by_choice) == len(fits) else None,
    )


def write(found: Report, pictures: Sequence[Picture], output: Path) -> None:
    """Write the page, the Markdown, the figures and, last, `report.json`."""
    for picture in pictures:
        _write_image(output / f"{picture.name}.png", picture.light)
    write_text(output / "report.html", make_page(found, pictures))
    write_text(output / "report.md", make_markdown(found, pictures))
    write_text(output / "report.json", dump(found))


def _write_image(path: Path, image: bytes) -> None:
    write_atomically(path, lambda temporary: _fill(temporary, image))


def _fill(path: Path, image: bytes) -> None:
    path.write_bytes(image)


def _check_seeds(item: Asked, caches: Sequence[Cache]) -> None:
    found = dict.fromkeys(cache.manifest.contract.tokenizer.sha256[:12] for cache in caches)
    if len(found) > 1:
        raise MisuseError(
            f"--{item.role} {item.name}: its directories are seeds of one student and have different tokenizers (sha256 {', '.join(found)}); "
            "give each tokenizer a NAME=DIR of its own"
        )


def _check_same(first: Teacher, cache: Cache, seen: Observation, path: str) -> None:
    expected, found = first.cache.manifest.contract, cache.manifest.contract
    same = expected.task == found.task and expected.label_names == found.label_names
    if not same or not np.array_equal(first.seen.predictions.labels, seen.predictions.labels, equal_nan=True):
        raise ContractError(
            f"{redact(str(path))}: holds other rows or labels than {first.cache.where} (expected {len(first.seen.predictions.labels)} positions of {expected.task}, "
            f"found {len(seen.predictions.labels)} of {found.task}); students of several teachers are compared on the same rows: cache the same split with each"
        )


def _observed(teachers: Iterable[Teacher], subjects: Sequence[Subject]) -> dict[str, tuple[Observation, ...]]:
    found: dict[str, tuple[Observation, ...]] = {teacher.name: (teacher.seen,) for teacher in teachers}
    for subject in subjects:
        found[subject.name] = subject.seen
        found[subject.scaled_name] = subject.scaled
    return found


def _calibrations(teachers: Iterable[Teacher], subjects: Sequence[Subject], scores: Scores) -> tuple[Calibration, ...]:
    lines = [calibration_line(teacher.name, (teacher.seen,), scores, None) for teacher in teachers]
    for subject in subjects:
        lines.append(calibration_line(subject.name, subject.seen, scores, None))
        temperature = float(np.mean(subject.temperatures))
        lines.append(calibration_line(subject.scaled_name, subject.scaled, scores, temperature))
    return tuple(lines)


def _costs(
    config: ReportConfig, teachers: Mapping[str, Teacher], subjects: Sequence[Subject], basis: Basis
) -> tuple[tuple[Cost, ...], Machine | None]:
    """Measure costs with the first seed of each model; seeds differ in weights only."""
    first = next(iter(teachers.values()))
    candidates = []
    if config.teacher is not None:
        count = first.cache.manifest.contract.teacher.num_parameters
        candidates.append(Candidate("teacher", config.teacher, first.cache.location, count))
    directories = {item.name: item.directories[0] for item in asked_models(config.student, config.control)}
    candidates += [
        Candidate(s.name, directories[s.name], s.teacher.cache.location, s.model.num_parameters, s.has_own_tokens)
        for s in subjects
    ]
    return measure_costs(
        candidates,
        config.split,
        rounds=config.rounds,
        batch_rows=config.batch_size or basis.task.default_eval_rows,
        threads=config.threads,
        watts=config.watts,
        in_bytes=basis.in_bytes,
    )
