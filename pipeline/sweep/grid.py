"""Plan the runs of a sweep and their names, which state everything that differs between them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.config import SweepConfig, TrainStudentConfig
from pipeline.config.options import name_and_path
from pipeline.config.sweep import parse_layers, parse_shape
from pipeline.errors import MisuseError
from pipeline.models.initialize import Shape
from pipeline.records import DIVERGENCE_KINDS, Loss

Role = Literal["student", "control"]


@dataclass(frozen=True, slots=True)
class Start:
    """The source of a student's initial weights: a model, a random shape, or teacher layers.

    A model is a directory or hub name; a student with a shape has random weights.
    """

    name: str
    path: str | None = None
    shape: Shape | None = None
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One student to train."""

    group: str
    """Name of everything that differs except the seed."""
    role: Role
    cache: str
    start: Start
    seed: int
    loss: Loss
    teacher_labels: bool = False

    @property
    def name(self) -> str:
        """The group with the seed."""
        return f"{self.group}-seed{self.seed}"

    @property
    def directory(self) -> Path:
        """Directory relative to the sweep's output."""
        return Path("runs", self.name)


def named_caches(config: SweepConfig) -> dict[str, str]:
    """Return name -> directory of the caches.

    Raises:
        MisuseError: two caches have the same name.
    """
    return _named("--cache", config.cache)


def plan(config: SweepConfig, caches: Sequence[str]) -> tuple[PlannedRun, ...]:
    """Return all runs, ordered by seed, so that a stopped sweep has already compared settings.

    Raises:
        MisuseError: two students have the same name.
    """
    found = []
    several = len(caches) > 1
    for seed in dict.fromkeys(config.seed):
        for cache in caches:
            for start in starts(config):
                for loss, teacher_labels in _losses(config, with_labels_alone=cache == caches[0]):
                    parts = [start.name, _loss_name(loss, teacher_labels), *([cache] if several else [])]
                    soft = loss.soft_weight > 0
                    role: Role = "student" if soft else "control"
                    found.append(PlannedRun("-".join(parts), role, cache, start, seed, loss, teacher_labels))
    return tuple(found)


def starts(config: SweepConfig) -> tuple[Start, ...]:
    """Return the initial weights of the students.

    Raises:
        MisuseError: two of them have the same name.
    """
    found = [Start(name, path=path) for name, path in _named("--student", config.student).items()]
    found += [Start(text, shape=Shape(*parse_shape(text))) for text in dict.fromkeys(config.shape)]
    found += [
        Start("layers-" + text.replace(",", "-"), layers=parse_layers(text)) for text in dict.fromkeys(config.layers)
    ]
    names = [start.name for start in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise MisuseError(f"--student: two students have the name {twice}; give NAME=DIR")
    return tuple(found)


def train_config(config: SweepConfig, run: PlannedRun, *, cache: str, student: str) -> TrainStudentConfig:
    """Return the configuration of `train-student` for one run."""
    return TrainStudentConfig(
        cache=(cache,),
        student=student,
        output=str(Path(config.output, run.directory)),
        split=(config.split,),
        eval_split=config.eval_split,
        hard_weight=run.loss.hard_weight,
        soft_weight=run.loss.soft_weight,
        temperature=run.loss.temperature,
        divergence=run.loss.divergence,
        tail_policy=run.loss.tail,
        hard_labels="teacher" if run.teacher_labels else "data",
        epochs=config.epochs,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
        seed=run.seed,
        report_to=config.report_to,
        training=config.training,
    )


def _losses(config: SweepConfig, *, with_labels_alone: bool) -> list[tuple[Loss, bool]]:
    """Return the losses, each with whether its hard labels are the teacher's.

    Training on the data's labels alone does not depend on the teacher, so it is done for one cache.
    """
    found = [(loss, False) for loss in config.losses if loss.soft_weight or with_labels_alone]
    if config.controls:
        found += [(Loss(1.0, 0.0), False)] if with_labels_alone else []
        found.append((Loss(1.0, 0.0), True))
    return list(dict.fromkeys(found))


def _loss_name(loss: Loss, teacher_labels: bool) -> str:
    if not loss.soft_weight:
        return "teacher-labels" if teacher_labels else "labels"
    kind = "" if loss.divergence == "forward-kl" else f"-{loss.divergence}"
    has_temperature = loss.temperature is not None and DIVERGENCE_KINDS[loss.divergence].power
    temperature = f"-T{loss.temperature:g}" if has_temperature else ""
    return f"{loss.hard_weight:g}-{loss.soft_weight:g}{kind}{temperature}"


def _named(flag: str, items: Sequence[str]) -> dict[str, str]:
    """Return name -> path from items `NAME=DIR` or `DIR`, which is named after the directory.

    A name becomes part of a directory name, so other characters are replaced by "-".

    Raises:
        MisuseError: two items have the same name.
    """
    found: dict[str, str] = {}
    for item in items:
        name, path = name_and_path(item)
        name = re.sub(r"[^\w.-]+", "-", name)
        if name in found:
            raise MisuseError(f"{flag}: two have the name {name}; give NAME=DIR")
        found[name] = path
    return found
