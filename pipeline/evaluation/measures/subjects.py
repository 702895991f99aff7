"""A student or control with its observations and the teacher that it is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.cache import Cache
from pipeline.evaluation.measures.observation import Observation
from pipeline.evaluation.records import Model


@dataclass(frozen=True, slots=True)
class Teacher:
    """The teacher of one cache, observed through the cache."""

    name: str
    cache: Cache
    seen: Observation


@dataclass(frozen=True, slots=True)
class Subject:
    """One student or control, with all its seeds."""

    model: Model
    teacher: Teacher
    cache: Cache
    """The teacher's cache; in the model's tokens if it has another tokenizer."""
    seen: tuple[Observation, ...]
    """Observations as trained, by seed."""
    scaled: tuple[Observation, ...]
    """Observations with temperature scaling, by seed."""
    temperatures: tuple[float, ...]
    """Temperatures of the scaling, by seed; means over folds."""
    chosen_by: float | None
    """Main metric on the calibration split, mean over seeds; None: no calibration split."""

    @property
    def name(self) -> str:
        """The name given by the user."""
        return self.model.name

    @property
    def scaled_name(self) -> str:
        """The name of the model with temperature scaling."""
        return f"{self.model.name}, scaled"

    @property
    def has_own_tokens(self) -> bool:
        """Whether its tokenizer differs from the teacher's."""
        return self.cache.vocabulary_map is not None

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """The seeds of the runs."""
        return tuple(run.seed for run in self.model.runs)


def same_seeds(*subjects: Subject) -> bool:
    """Whether the runs of all subjects can be paired by seed."""
    return all(subject.seeds == subjects[0].seeds for subject in subjects)
