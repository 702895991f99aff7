"""The record of a data set that has been loaded and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.records import Columns, UnlabelledSource
from pipeline.sources.columns import is_chat
from pipeline.sources.files.joined import JoinedRows, Rows, is_in_place
from pipeline.sources.files.parquet import ParquetRows


@dataclass(frozen=True, slots=True)
class Source:
    """A loaded data set with checked columns."""

    name: str
    """Hub name, relative path, or the last part of another path; never an absolute path, which is
    specific to one machine."""
    config: str | None
    revision: str | None
    """The commit of a hub data set, or the requested revision if the commit is not known."""
    splits: Mapping[str, Rows]
    columns: Columns
    """`label` is None if no split has the label column."""
    holdout: float
    """Share of `train` that was held out as `test`; 0 if the data set has a `test`."""
    unlabelled: tuple[UnlabelledSource, ...] = ()
    """Data sets whose rows are appended to `train`, without labels."""
    directory: Path | None = None
    """Images: the directory that file paths in the data set are relative to; None: caches cannot
    refer to its files."""
    place: str = ""
    """Images: machine-independent name of `directory`; recorded file paths begin with it."""

    @property
    def row_groups(self) -> dict[str, list[int]]:
        """First row of each row group, by split, for the splits that are read by row group."""
        return {
            split: rows.starts.tolist()
            for split, rows in self.splits.items()
            if isinstance(rows, ParquetRows | JoinedRows) and is_in_place(rows)
        }

    def sample_ranges(self, split: str, start: int, stop: int, most: int) -> list[range]:
        """Return the rows of `[start, stop)` from which a sample may be drawn.

        If reading one row means reading its whole row group, these are the rows of at most `most`
        evenly spaced row groups; else all rows.
        """
        rows = self.splits[split]
        grouped = isinstance(rows, ParquetRows | JoinedRows)
        return rows.few_groups(start, stop, most) if grouped else [range(start, stop)]


def holds_chats(source: Source) -> bool:
    """Return whether any split holds chats."""
    return any(is_chat(dataset, source.columns) for dataset in source.splits.values())
