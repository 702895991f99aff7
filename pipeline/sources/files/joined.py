"""Concatenate data sets with different columns, or labelled and unlabelled ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pipeline.sources.files.parquet import ParquetRows
from pipeline.sources.files.remote import shareable_url

if TYPE_CHECKING:
    from datasets import Dataset

#: The rows of one data set: an Arrow table of `datasets`, or Parquet files that are read in place.
OneRows: TypeAlias = "Dataset | ParquetRows"
#: The rows of one split, from one data set or several.
Rows: TypeAlias = "OneRows | JoinedRows"


class JoinedRows:
    """The rows of several data sets, concatenated in order.

    The type of a column is that of the first part that has the column with a type other than null.
    A column that a part lacks is null in its rows.
    """

    def __init__(
        self,
        parts: Sequence[OneRows],
        *,
        names: Sequence[str] = (),
        label: str | None = None,
        unlabelled: Collection[int] = (),
    ) -> None:
        """Join data sets into one.

        Args:
            parts: the data sets, in the order of their rows.
            names: the file of each part, for messages. Empty: the parts are not files of one split.
            label: the column with the class label.
            unlabelled: indices of the parts whose label column is not read, and whose column types
                are ignored.
        """
        import datasets

        self.parts = tuple(parts)
        self.names = tuple(names)
        self.label = label
        self.unlabelled = frozenset(unlabelled)
        found: dict[str, Any] = {}
        for part in (part for i, part in enumerate(self.parts) if i not in self.unlabelled):
            for name, feature in part.features.items():
                if name not in found or getattr(found[name], "dtype", None) == "null":
                    found[name] = feature
        self.features: Any = datasets.Features(found)
        self.bounds: list[int] = np.cumsum([0, *(len(part) for part in parts)]).tolist()
        """(parts + 1,): the first row of each part, and the number of rows."""

    def __len__(self) -> int:
        return self.bounds[-1]

    @property
    def column_names(self) -> list[str]:
        """The columns of all parts that are not in `unlabelled`."""
        return list(self.features)

    @property
    def in_place(self) -> bool:
        """Whether some rows are read by row group."""
        return any(isinstance(part, ParquetRows) for part in self.parts)

    @property
    def starts(self) -> np.ndarray:
        """(row groups,) the first row of each row group of the Parquet parts."""
        found = [p.starts + b for p, b in zip(self.parts, self.bounds, strict=False) if isinstance(p, ParquetRows)]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def holds(self, part: int, name: str) -> bool:
        """Return whether a column is read from a part; labels of unlabelled parts are not."""
        return name in self.parts[part].column_names and not (name == self.label and part in self.unlabelled)

    def select(self, rows: np.ndarray) -> JoinedRows:
        """Select rows, given as (n,) int64 in ascending order."""
        parts: list[OneRows] = []
        names: list[str] = []
        unlabelled: list[int] = []
        for i, (first, last) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
            chosen = rows[(rows >= first) & (rows < last)] - first
            if len(chosen):
                unlabelled += [len(parts)] if i in self.unlabelled else []
                names += self.names[i : i + 1]
                parts.append(self.parts[i].select(chosen))
        return JoinedRows(parts, names=names, label=self.label, unlabelled=unlabelled)

    def pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return the rows `[start, stop)` as (part, first, last), with rows counted per part."""
        return [
            (i, max(start, first) - first, min(stop, last) - first)
            for i, (first, last) in enumerate(zip(self.bounds, self.bounds[1:], strict=False))
            if max(start, first) < min(stop, last)
        ]

    def few_groups(self, start: int, stop: int, most: int) -> list[range]:
        """Return the rows `[start, stop)`, of each Parquet part in at most `most` row groups."""
        found = []
        for i, first, last in self.pieces(start, stop):
            part, before = self.parts[i], self.bounds[i]
            near = part.few_groups(first, last, most) if isinstance(part, ParquetRows) else [range(first, last)]
            found += [range(rows.start + before, rows.stop + before) for rows in near]
        return found


def parts_of(rows: Rows) -> tuple[OneRows, ...]:
    """Return the data sets that the rows consist of."""
    return rows.parts if isinstance(rows, JoinedRows) else (rows,)


def with_partial_columns(rows: Rows, only: Collection[str] | None = None) -> Rows:
    """Add the columns that only some Parquet files have; they are null in rows of other files.

    Args:
        rows: the files of one split.
        only: the columns to add; None: all.
    """
    parts: list[OneRows] = []
    names: list[str] = []
    given = rows.names if isinstance(rows, JoinedRows) else ("",)
    for name, part in zip(given, parts_of(rows), strict=True):
        found: list[tuple[str, OneRows]] = [(name, part)]
        if isinstance(part, ParquetRows):
            partial = [column for column in part.absent if only is None or column in only]
            found = [(shareable_url(location), run) for location, run in part.split_by(*partial)] if partial else found
        names += [name for name, _ in found]
        parts += [run for _, run in found]
    return rows if len(parts) == len(given) else JoinedRows(parts, names=names)


def is_in_place(rows: Rows) -> bool:
    """Return whether some rows are read by row group."""
    return isinstance(rows, ParquetRows) or (isinstance(rows, JoinedRows) and rows.in_place)
