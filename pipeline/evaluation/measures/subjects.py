"""A student or control with all that was seen of it, and the teacher that it is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.cache import Cache
from pipeline.evaluation.measures.observation import Observation
from pipeline.evaluation.records import Model


@dataclass(frozen=True, slots=True)
class Teacher:
    """The teacher of one cache, as the cache tells of it."""

    name: str
    cache: Cache
    seen: Observation


@dataclass(frozen=True, slots=True)
class Subject:
    """All seeds of one student or control."""

    model: Model
    teacher: Teacher
    cache: Cache
    """The teacher's, as the model reads it: for another tokenizer, in its own tokens."""
    seen: tuple[Observation, ...]
    """As trained, by seed."""
    scaled: tuple[Observation, ...]
    """With temperature scaling, by seed."""
    temperatures: tuple[float, ...]
    """Of the scaling, by seed: the mean over folds."""
    chosen_by: float | None
    """The main metric on the calibration split, the mean over seeds; None: there is none."""

    @property
    def name(self) -> str:
        """As the user names it."""
        return self.model.name

    @property
    def scaled_name(self) -> str:
        """Of the same with temperature scaling."""
        return f"{self.model.name}, scaled"

    @property
    def has_own_tokens(self) -> bool:
        """Whether its tokenizer is not the teacher's."""
        return self.cache.vocabulary_map is not None

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """Of the runs."""
        return tuple(run.seed for run in self.model.runs)


def same_seeds(*subjects: Subject) -> bool:
    """Whether the runs of all pair up by their seeds."""
    return all(subject.seeds == subjects[0].seeds for subject in subjects)
