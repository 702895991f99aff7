"""`softlabel run`: run the stages of a configuration file in order, and skip those that are done.

A stage is done if its output exists and was made from the same settings and inputs. Inputs are
compared by content (a cache by its manifest), so a changed input makes the stages that depend on it
run again. A cache or a generated data set is never deleted without `--overwrite`: if it was made
with other settings or another teacher, the run stops and names the first difference. A stale model
or report is replaced, unless a cache was made with the model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from glob import has_magic
from pathlib import Path
from typing import Any

from pipeline.cache.format.manifest import Layout
from pipeline.cache.reading.remote import read_small
from pipeline.cache.storage.commit import write_text
from pipeline.cache.storage.urls import is_url, pinned
from pipeline.cache.writing.place import current_plan, open_layout
from pipeline.config import STAGES, ConfigFile, DataConfig, GenerateConfig, resolve, steps_of, through_stage
from pipeline.config.options import name_and_path
from pipeline.errors import CacheError, ConfigError, MisuseError
from pipeline.evaluation.report.figures import require_matplotlib
from pipeline.generation.records import NAMES
from pipeline.models.saved import checkpoints
from pipeline.records import Outline
from pipeline.rounds import Written, progress, warn_of_own_labels, written_caches
from pipeline.sources.files.arrow import is_saved
from pipeline.sources.files.layout import files_named, find_files
from pipeline.sources.files.loading import redact
from pipeline.steps import INPUTS, Resolved, check_caches, check_steps, named_inputs, place_of, warn_of_steps

logger = logging.getLogger(__name__)

#: The file that each stage writes last; its presence shows that the output is complete.
_PROOF = {
    "train-teacher": "metrics.json",
    "generate": "generation.json",
    "cache-logits": "manifest.json",
    "init-student": "config.json",
    "train-student": "distillation.json",
    "evaluate": "evaluation.json",
    "report": "report.json",
}
#: Stages that resume from their checkpoints.
_TRAINING = ("train-teacher", "train-student")
#: Settings that hold a template itself or the name of its file.
_TEMPLATES = ("template", "prompt_template")


def stage_configs(
    file: ConfigFile, stages: tuple[str, ...] = (), through: str | None = None
) -> Iterator[tuple[str, Any]]:
    """The stages to run, in order, with their configurations.

    A stage with several sections or rounds occurs several times.

    Args:
        stages: run only these; empty: all.
        through: run no stage after the last step of this one.

    Raises:
        ConfigError: the file does not have a stage.
        PipelineError: a section is invalid; raised before anything runs.
    """
    return ((step.stage, config) for step, config in _steps(file, stages, through))


def _steps(file: ConfigFile, stages: tuple[str, ...], through: str | None) -> list[Resolved]:
    for name in (*stages, *([through] if through else [])):
        if name not in file.sections:
            raise ConfigError(f"{file.path}: no section {name!r}; it has {', '.join(file.sections) or 'none'}")
    steps = steps_of(file)
    found: list[Resolved] = [
        (step, resolve(STAGES[step.stage], file, step.section, {}))
        for step in (steps if through is None else through_stage(steps, through))
        if not stages or step.stage in stages
    ]
    check_steps(file, found)
    return found


def run(
    file: ConfigFile,
    runners: Mapping[str, Callable[[Any], None]],
    stages: tuple[str, ...] = (),
    through: str | None = None,
    *,
    overwrite: bool = False,
    shown: Mapping[str, Callable[[Any], None]] | None = None,
    tell: Callable[[str], None] = logger.info,
) -> None:
    """Run the stages that are not done.

    Args:
        runners: stage -> function that runs it and prints its result.
        overwrite: replace caches and generated data sets made with other settings or inputs. False:
            raise an error, since they may have taken days.
        shown: stage -> function that prints the result of a stage that is done.
        tell: function that prints a line on each round.

    Raises:
        PipelineError: a stage failed; the stages before it stay done.
    """
    steps = _checked(file, stages, through, overwrite=overwrite)
    if any(step.stage == "report" for step, _ in steps):
        try:
            require_matplotlib()  # fail before hours of work
        except MisuseError:
            if not all(_is_done(Path(config.output or ""), step.stage, config, _key(config)) for step, config in steps):
                raise
    written, told = written_caches(steps), dict[tuple[int, int], Written]()
    for step, config in steps:
        _run_step(step.stage, config, runners, overwrite=overwrite, shown=shown or {})
        if step.stage == "cache-logits" and (found := written.get(place_of(config.output))) is not None:
            line = progress(config.output, found, told)
            if line is not None:
                tell(line)


def _checked(file: ConfigFile, stages: tuple[str, ...], through: str | None, *, overwrite: bool) -> list[Resolved]:
    """Return the steps, after all checks that need no stage to run."""
    steps = _steps(file, stages, through)
    warn_of_own_labels(steps)
    warn_of_steps(steps)
    check_caches(file, steps)
    _check_replaced(steps, overwrite=overwrite)
    return steps


def _check_replaced(steps: Sequence[Resolved], *, overwrite: bool) -> None:
    """Check that no model is replaced that a cache or a generated data set was made with.

    The run would delete the model, train another one, and then stop at the cache.

    Raises:
        ConfigError: the message names both outputs.
    """
    replaced: dict[str, str] = {}
    for step, config in steps if not overwrite else ():
        if config.output is None or is_url(config.output):
            continue
        output, stage = Path(config.output), step.stage
        of_replaced = sorted(named_inputs(config).intersection(replaced))
        if of_replaced and _is_begun(stage, config):
            raise ConfigError(
                f"{output}: was made with {of_replaced[0]}, which {replaced[of_replaced[0]]} would replace since its settings or inputs have changed; "
                "--overwrite replaces both; to keep both, give the sections other outputs"
            )
        finished = _mark(output, stage).is_file() and (output / _PROOF[stage]).is_file()
        if stage in _TRAINING and finished and (of_replaced or not _is_done(output, stage, config, _key(config))):
            replaced[os.path.normpath(output)] = stage


def _run_step(
    name: str,
    config: Any,
    runners: Mapping[str, Callable[[Any], None]],
    *,
    overwrite: bool,
    shown: Mapping[str, Callable[[Any], None]],
) -> None:
    """Run one step, or show its result if it is done."""
    output = Path(config.output) if config.output is not None else None
    key = _key(config)
    if output is not None and _is_done(output, name, config, key):
        logger.info("%s: %s is up to date", name, redact(str(config.output)))
        if name in shown:
            shown[name](config)
        return
    logger.info("%s: %s", name, redact(str(config.output or "")))
    if _gives_way(name, config, key, asked=overwrite):
        if output is not None and name in _TRAINING and (output / _PROOF[name]).is_file():
            logger.warning("%s: %s %s, and is replaced", name, output, _reason(output, name))
        config = dataclasses.replace(config, overwrite=True)
    if output is not None and name in _TRAINING:
        write_text(_mark(output, name), _begun(key))
    runners[name](config)
    if output is not None and (output / _PROOF[name]).is_file():  # missing for one part of a cache, or behind a URL
        _mark(output, name).write_text(_state(output, name, key), encoding="utf-8")


def outline(
    file: ConfigFile,
    outlines: Mapping[str, Callable[[Any], Outline]],
    stages: tuple[str, ...] = (),
    through: str | None = None,
    *,
    overwrite: bool = False,
) -> Iterator[tuple[str, Outline]]:
    """Describe what `run` would do: each stage with its output, and why it runs or is skipped.

    Args:
        outlines: stage -> function that describes its work; called if all inputs of the stage
            exist.

    Raises:
        PipelineError: a stage whose inputs exist would fail its checks.
    """
    to_come: set[str] = set()
    steps = _checked(file, stages, through, overwrite=overwrite)
    for name, config in ((step.stage, config) for step, config in steps):
        shown = f"{name} {redact(str(config.output or ''))}".rstrip()
        output = Path(config.output) if config.output is not None else None
        waits = sorted(to_come.intersection(named_inputs(config)))
        if waits:
            why = f"runs: reads {', '.join(waits)}, which a stage before makes"
        else:
            key = _key(config)
            if output is not None and _is_done(output, name, config, key):
                yield shown, (("stage", "is skipped: up to date"),)
                continue
            why = "runs: " + _reason(output, name)
            if _gives_way(name, config, key, asked=overwrite):
                config = dataclasses.replace(config, overwrite=True)
                why += "; the existing output is replaced" if output is not None and output.exists() else ""
        if config.output is not None:
            to_come.add(os.path.normpath(config.output))
        asked = outlines.get(name) if not waits else None
        yield shown, (("stage", why), *(asked(config) if asked is not None else ()))


def _reason(output: Path | None, stage: str) -> str:
    if output is None:
        return "it has no output"
    if not (output / _PROOF[stage]).is_file():
        return "is not finished" if _mark(output, stage).is_file() else "is not there"
    return "has other settings or inputs" if _mark(output, stage).is_file() else "was not made by softlabel run"


def _mark(output: Path, stage: str) -> Path:
    return output / f".stage-{stage}.json"


def _gives_way(stage: str, config: Any, key: str, *, asked: bool) -> bool:
    """Whether the existing output of a stage is deleted.

    A cache or a generated data set is deleted only if asked; a stale model or report always, except
    an unfinished training run of the same settings, which resumes.
    """
    if stage == "report":
        return True
    if asked and _is_begun(stage, config):
        return True
    if stage not in _TRAINING or getattr(config, "resume", False):
        return False
    mark, proof = _mark(Path(config.output), stage), Path(config.output, _PROOF[stage])
    if asked or proof.is_file() or not mark.is_file() or mark.read_text(encoding="utf-8") != _begun(key):
        return True
    return not checkpoints(Path(config.output))  # without one, it cannot be resumed


def _is_begun(stage: str, config: Any) -> bool:
    """Whether the output of a stage is a cache or a generated data set, finished or not."""
    if stage == "cache-logits":
        return current_plan(open_layout(config.output)) is not None
    return stage == "generate" and Layout(Path(config.output), names=NAMES).plan.is_file()


def _begun(key: str) -> str:
    """The mark of a training run that has begun; it is resumed, not stale."""
    return json.dumps({"key": key, "output": None}) + "\n"


def _state(output: Path, stage: str, key: str) -> str:
    """Fingerprint of settings, inputs and output, which a later command by hand changes."""
    return json.dumps({"key": key, "output": _file(output / _PROOF[stage])}) + "\n"


def _is_done(output: Path, stage: str, config: Any, key: str) -> bool:
    mark = _mark(output, stage)
    if not (mark.is_file() and (output / _PROOF[stage]).is_file()):
        return False
    kept = mark.read_text(encoding="utf-8")
    return kept == _state(output, stage, key) or kept == _state(output, stage, _key(config, before=True))


#: Former fixed defaults of training, now chosen for student and data. Outputs made with them stay
#: done.
_BEFORE = {
    "epochs": 3.0,
    "max_steps": -1,
    "learning_rate": 5e-5,
    "batch_size": 16,
    "hard_weight": 0.5,
    "soft_weight": 0.5,
    "divergence": "forward-kl",
}


def _key(config: Any, *, before: bool = False) -> str:
    """SHA-256 over the settings and the content of the inputs that they name.

    Args:
        before: compute the key of earlier versions, with fixed defaults of training.
    """
    settings = dataclasses.asdict(config)
    found: dict[str, Any] = {}
    data = _data_of(config)
    for name, value in {**settings, **settings.get("data", {})}.items():
        if name == "dataset" and data is not None and data.data_files and not before:
            continue  # only the listed files count, see below
        if name in _TEMPLATES and isinstance(value, str) and ("{{" in value or "\n" in value):
            continue  # the template itself, part of the settings
        if name in INPUTS and value is not None:
            names = [name_and_path(item)[1] for item in value] if isinstance(value, tuple) else [value]
            found[name] = [_manifest_at(item) if is_url(item) else content_of(Path(item)) for item in names]
    if data is not None:
        found["files"] = _nested_files(data, before=before)
    for name in ("overwrite", "report_to", "concurrency", "server_patience", "check_with"):
        settings.pop(name, None)  # they do not affect the output
    if "tokenizer" in settings and settings["tokenizer"] is None:  # as before students could have their own
        for name in ("tokenizer", "cache"):
            settings.pop(name)
    for name in ("server", "server_model", "server_api"):
        if not settings.get(name):  # as before servers were supported
            settings.pop(name, None)
    if not any(settings.get(name) for name in ("prompt_template", "label_text", "shots")):  # as without prompts
        for name in ("prompt_template", "label_text", "prompt_format", "shots", "shot_tokens", "calibrate"):
            settings.pop(name, None)
    if before:
        if "model" in settings:  # train-teacher
            settings.pop("on_bad_row", None)
        settings |= {name: value for name, value in _BEFORE.items() if settings.get(name, value) is None}
    return hashlib.sha256(json.dumps([settings, found], sort_keys=True, default=str).encode()).hexdigest()


def _data_of(config: Any) -> DataConfig | None:
    """The data set that a stage reads rows from; None if it reads none."""
    if isinstance(config, GenerateConfig):
        return config.data() if config.dataset is not None else None
    data = getattr(config, "data", None)
    return data if isinstance(data, DataConfig) else None


def _manifest_at(url: str) -> str:
    """SHA-256 of the manifest of a cache behind a URL; `absent` if there is none."""
    try:
        return hashlib.sha256(read_small(pinned(url), "manifest.json")).hexdigest()
    except (FileNotFoundError, CacheError):
        return "absent"


def content_of(path: Path) -> str:
    """SHA-256 of a file, of a cache's manifest, or of a directory's files.

    A name that is not a local path, such as a hub name, is returned unchanged.
    """
    if (path / "manifest.json").is_file():
        path = path / "manifest.json"
    if path.is_file():
        return _file(path)
    if path.is_dir():
        files = sorted(
            p
            for p in path.iterdir()
            if p.is_file() and not p.name.startswith(".") and p.suffix not in (".py", ".yaml", ".md")
        )
        return hashlib.sha256("".join(f"{p.name} {_file(p)}\n" for p in files).encode()).hexdigest()
    return str(path)


def _nested_files(data: DataConfig, *, before: bool) -> str | None:
    """SHA-256 of the files of `data_files`, or of files in subdirectories; None: no such files."""
    path = Path(data.dataset).expanduser()
    if is_url(data.dataset) or not (path.exists() or has_magic(data.dataset)):
        return None
    if data.image_column is not None:
        return _images_below(path if path.is_dir() else path.parent)
    if is_saved(path):
        files = sorted(path.rglob("*.arrow"))
    else:
        splits = files_named(path, data.data_files) if data.data_files else find_files(path, config=data.dataset_config)
        files = [file for members in splits.values() for file in members]
        if data.data_files and not before:
            named = [f"{split} {file.name} {_file(file)}\n" for split, members in splits.items() for file in members]
            return hashlib.sha256("".join(named).encode()).hexdigest()
    nested = [file for file in files if file.parent != path and file != path]
    return hashlib.sha256("".join(f"{_file(file)}\n" for file in nested).encode()).hexdigest() if nested else None


def _images_below(folder: Path) -> str:
    """SHA-256 of names, sizes and times of all files below a directory, for images."""
    found = sorted((file.relative_to(folder).as_posix(), file.stat()) for file in folder.rglob("*") if file.is_file())
    lines = (f"{name} {state.st_size} {state.st_mtime_ns}\n" for name, state in found)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
