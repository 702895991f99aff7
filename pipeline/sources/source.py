"""The record of a data set that is ready to be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.records import Columns

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, slots=True)
class Source:
    """A data set whose columns are known to be there."""

    name: str
    """Hub name, relative path, or the last part of any other path: never where the data lies on one machine."""
    config: str | None
    revision: str | None
    """Of a hub data set: the commit, or what was asked for where the commit is not known."""
    splits: dict[str, datasets.Dataset]
    columns: Columns
    """`label` is None where no split has such a column."""
    holdout: float
    """Share of `train` that is now `test`; 0 where there was a `test`."""
