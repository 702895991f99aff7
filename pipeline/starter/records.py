"""Findings and choices of `softlabel init`, from which file and screen output are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config import DataConfig
from pipeline.starter.counts import Counts
from pipeline.starter.facts import Facts
from pipeline.starter.roles import Roles
from pipeline.starter.teacher import Known, Speed


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of the rows of `train` in tokens, and the chosen maximum."""

    median: int
    most: int
    """95th percentile of the lengths."""
    longest: int
    chosen: int
    cut: float
    """Share of rows that are longer than the chosen maximum."""
    mean: float
    """Mean number of tokens that are read per row."""
    is_counted: bool
    """Whether lengths are counted with the tokenizer; else estimated from characters."""


@dataclass(frozen=True, slots=True)
class Start:
    """Findings on a data set, and the chosen settings to distil a student."""

    path: str
    """The path of the YAML file as given."""
    command: str
    task: str
    generative: bool
    """Whether the task's classes are tokens."""
    data: DataConfig
    """The section `data` of the YAML file."""
    added: tuple[str, ...]
    """`unlabelled` of the section `cache-logits`."""
    roles: Roles
    facts: Mapping[str, Facts]
    counts: Counts
    unlabelled_files: Mapping[str, int]
    """File of `--unlabelled` -> number of rows."""
    moved: tuple[str, ...]
    """Splits without labels whose rows are added to `train`."""
    lengths: Lengths
    known: Known
    speed: Speed | None
    is_teacher: bool
    """Whether the model is used as a teacher without fine-tuning."""
    is_default: bool
    """Whether the model is the default, not given by a flag."""
    evaluated: str
    """The split that students are evaluated on."""
    can_draw: bool
    """Whether matplotlib is installed, which the report needs."""
    runs: str

    @property
    def has_labels(self) -> bool:
        """Whether hard labels exist, to train and evaluate students on."""
        return self.generative or bool(self.counts.classes)

    @property
    def is_split(self) -> bool:
        """Whether rows that are too long are read in pieces; otherwise they are truncated."""
        return self.generative and self.roles.text is not None

    @property
    def measured(self) -> int:
        """Number of labelled rows that students are evaluated on."""
        found = self.counts.splits.get(self.evaluated)
        return 0 if found is None or not self.has_labels else found.rows if self.generative else found.labelled

    @property
    def labelled(self) -> int:
        """Number of rows of `train` with a label."""
        return self.counts.splits["train"].labelled

    @property
    def has_unlabelled(self) -> bool:
        """Whether some rows of `train` have no label."""
        train = self.counts.splits["train"]
        return not self.generative and train.labelled < train.read

    @property
    def has_empty(self) -> bool:
        """Whether some rows have an empty input."""
        return any(split.empty for split in self.counts.splits.values())

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns that a model reads."""
        return tuple(name for name in self.facts if name in self.roles.named and name != self.roles.label)

    @property
    def others(self) -> tuple[Facts, ...]:
        """Columns that are not read."""
        return tuple(each for name, each in self.facts.items() if name not in self.roles.named)
