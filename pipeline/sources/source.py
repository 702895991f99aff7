"""The record of a data set that is ready to be read."""

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
    """A data set whose columns are known to be there."""

    name: str
    """Hub name, relative path, or the last part of any other path: never where the data lies on one
    machine."""
    config: str | None
    revision: str | None
    """Of a hub data set: the commit, or what was asked for where the commit is not known."""
    splits: Mapping[str, Rows]
    columns: Columns
    """`label` is None where no split has such a column."""
    holdout: float
    """Share of `train` that is now `test`; 0 where there was a `test`."""
    unlabelled: tuple[UnlabelledSource, ...] = ()
    """Data sets whose rows stand behind those of `train`, without labels."""
    directory: Path | None = None
    """Images: what the paths of files in the data set are relative to; None: caches cannot refer to
    its files."""
    place: str = ""
    """Images: where the directory lies for those who share it: what the places of files begin
    with."""

    @property
    def row_groups(self) -> dict[str, list[int]]:
        """Split -> the first row of each row group, of the splits that are read by row group."""
        return {
            split: rows.starts.tolist()
            for split, rows in self.splits.items()
            if isinstance(rows, ParquetRows | JoinedRows) and is_in_place(rows)
        }

    def sample_ranges(self, split: str, start: int, stop: int, most: int) -> list[range]:
        """The rows of `[start, stop)` that a sample is drawn from.

        Where one row costs its whole row group, those of at most so many row groups, evenly spaced;
        else all of them.
        """
        rows = self.splits[split]
        grouped = isinstance(rows, ParquetRows | JoinedRows)
        return rows.few_groups(start, stop, most) if grouped else [range(start, stop)]


def holds_chats(source: Source) -> bool:
    """Whether its rows are chats, in any split."""
    return any(is_chat(dataset, source.columns) for dataset in source.splits.values())
