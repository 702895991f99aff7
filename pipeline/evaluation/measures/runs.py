"""The models of a report, and their training as recorded in their directories."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache import Cache
from pipeline.cache.format.manifest import parse
from pipeline.config.options import name_and_path
from pipeline.errors import MisuseError, PipelineError
from pipeline.evaluation.records import Provenance, Role
from pipeline.models import public_name
from pipeline.records import TrainResult
from pipeline.tasks import get_task
from pipeline.training.batches.held_out import which_labelled
from pipeline.training.run import ORIGIN, Origin


@dataclass(frozen=True, slots=True)
class Asked:
    """One student or control as named by the user, with one directory per seed."""

    name: str
    role: Role
    directories: tuple[str, ...]


def asked_models(students: Sequence[str], controls: Sequence[str]) -> tuple[Asked, ...]:
    """`NAME=DIR` grouped by name, in order; students first.

    Raises:
        MisuseError: a name is both a student and a control, or `teacher`; a directory is given
            twice.
    """
    found: dict[str, tuple[Role, list[str]]] = {}
    roles: list[tuple[Role, Sequence[str]]] = [("student", students), ("control", controls)]
    for role, items in roles:
        for item in items:
            name, directory = name_and_path(item)
            known, directories = found.setdefault(name, (role, []))
            if known != role:
                raise MisuseError(f"--control {item}: {name} is a student already; give it another NAME=DIR")
            if directory in directories:
                raise MisuseError(f"--{role} {item}: the directory is given twice; each is one seed")
            directories.append(directory)
    if "teacher" in found:
        raise MisuseError("--student and --control: the name teacher is the teacher's; give NAME=DIR")
    return tuple(Asked(name, role, tuple(directories)) for name, (role, directories) in found.items())


def provenance(directory: str, caches: Mapping[str, Cache]) -> Provenance:
    """Read how a model was trained from its directory; missing or foreign files are ignored.

    Args:
        caches: cache_id -> cache, for the number of rows in an epoch.
    """
    path = Path(directory)
    result = _read(TrainResult, path / "distillation.json")
    if result is None:
        return Provenance(public_name(directory))
    origin = _read(Origin, path / ORIGIN)
    cache = caches.get(result.cache_id)
    passes = None
    if origin is not None and origin.batch_tokens is None and cache is not None:
        rows = _rows_that_teach(cache, origin)
        passes = result.steps * origin.rows_per_step / rows if rows else None
    return Provenance(
        directory=public_name(directory),
        cache_id=result.cache_id,
        loss=result.loss,
        teacher_labels=None if origin is None else origin.teacher_labels,
        seed=result.seed,
        learning_rate=result.learning_rate,
        steps=result.steps,
        seconds=result.seconds,
        passes=passes,
        history=_history(path),
    )


def _rows_that_teach(cache: Cache, origin: Origin) -> int:
    """Rows in one epoch; for training on hard labels only, those with a label."""
    splits = origin.split.split(", ")
    loss = origin.loss
    labels_alone = not (loss.soft_weight or loss.soft_weight_end or loss.span_weight or origin.teacher_labels)
    if labels_alone:
        return int(which_labelled(cache.dataset(splits), get_task(cache.manifest.contract.task)).sum())
    return sum(shard.rows for split in splits for shard in cache.manifest.split_shards(split))


def _read(kind: type[Any], path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return parse(kind, path)
    except PipelineError:  # written by another version
        return None


def _history(path: Path) -> tuple[Mapping[str, float], ...]:
    """The Trainer's log of the finished run, else of the newest checkpoint.

    Older versions stored it in checkpoints only.
    """
    checkpoints = sorted(
        path.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.rpartition("-")[2])
    )
    for file in (path / "trainer_state.json", *reversed(checkpoints)):
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))["log_history"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return tuple(
            {k: float(v) for k, v in entry.items() if isinstance(v, int | float) and math.isfinite(v)}
            for entry in entries
            if isinstance(entry, dict) and "step" in entry
        )
    return ()


def describe_model(model: Any) -> str:
    """Class, layers and width of a loaded model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = inner.config.get_text_config()
    layers, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    adapter = " with an adapter" if inner is not model else ""
    return f"{type(inner).__name__}{adapter}" + (f", {layers} layers of {width}" if layers and width else "")
