"""What `softlabel init` has found and chosen: the page and the screen are made from it."""

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
    """How long the rows of `train` are, and how many tokens of them are kept."""

    median: int
    most: int
    """95% of the rows are not longer."""
    longest: int
    chosen: int
    cut: float
    """Share of the rows that are longer than the longest that is read at once."""
    mean: float
    """Tokens of a row that are read."""
    is_counted: bool
    """With the tokenizer; else estimated from characters."""


@dataclass(frozen=True, slots=True)
class Start:
    """A data set, and how a student is distilled from it."""

    path: str
    """The file, as it was named."""
    command: str
    task: str
    generative: bool
    """Whether the classes are tokens."""
    data: DataConfig
    """The section `data` of the file."""
    added: tuple[str, ...]
    """`unlabelled` of the section `cache-logits`."""
    roles: Roles
    facts: Mapping[str, Facts]
    counts: Counts
    unlabelled_files: Mapping[str, int]
    """File of `--unlabelled` -> its rows."""
    moved: tuple[str, ...]
    """Splits without labels whose rows are read with those of `train`."""
    lengths: Lengths
    known: Known
    speed: Speed | None
    is_teacher: bool
    """The model is used as it is, not fine-tuned first."""
    is_default: bool
    """Whether the model is the default one, which no flag has named."""
    evaluated: str
    """The split that students are measured on."""
    can_draw: bool
    """Whether matplotlib is there, which the report needs."""
    runs: str

    @property
    def has_labels(self) -> bool:
        """Whether students can be trained on labels alone, and measured against them."""
        return self.generative or bool(self.counts.classes)

    @property
    def is_split(self) -> bool:
        """Whether rows that are too long are read in pieces, or cut."""
        return self.generative and self.roles.text is not None

    @property
    def measured(self) -> int:
        """Labelled rows that students are measured on."""
        found = self.counts.splits.get(self.evaluated)
        return 0 if found is None or not self.has_labels else found.rows if self.generative else found.labelled

    @property
    def labelled(self) -> int:
        """Rows of `train` with a label."""
        return self.counts.splits["train"].labelled

    @property
    def has_unlabelled(self) -> bool:
        """Whether some rows of `train` have no label."""
        train = self.counts.splits["train"]
        return not self.generative and train.labelled < train.read

    @property
    def has_empty(self) -> bool:
        """Whether some rows cannot be read."""
        return any(split.empty for split in self.counts.splits.values())

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns that a model reads."""
        return tuple(name for name in self.facts if name in self.roles.named and name != self.roles.label)

    @property
    def others(self) -> tuple[Facts, ...]:
        """Columns that are not read."""
        return tuple(each for name, each in self.facts.items() if name not in self.roles.named)
