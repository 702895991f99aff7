"""Data sets one after another, read as one: files with different columns, or labelled rows and rows without labels."""

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
#: The rows of one split: of one data set, or of several.
Rows: TypeAlias = "OneRows | JoinedRows"


class JoinedRows:
    """The rows of several data sets in order, read as one.

    The type of a column is that of the first part that has the column with a type other than null.
    Rows of a part without the column hold null there.
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
            unlabelled: indices of the parts whose label column is not read, and whose features are
                not taken.
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
        """(parts + 1,): the first row of each."""

    def __len__(self) -> int:
        return self.bounds[-1]

    @property
    def column_names(self) -> list[str]:
        """Columns that some part has."""
        return list(self.features)

    @property
    def in_place(self) -> bool:
        """Whether some of the rows are read by row group."""
        return any(isinstance(part, ParquetRows) for part in self.parts)

    @property
    def starts(self) -> np.ndarray:
        """(row groups,) the first row of each, of the parts that are read by row group."""
        found = [p.starts + b for p, b in zip(self.parts, self.bounds, strict=False) if isinstance(p, ParquetRows)]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def holds(self, part: int, name: str) -> bool:
        """Whether a column is read of a part."""
        return name in self.parts[part].column_names and not (name == self.label and part in self.unlabelled)

    def select(self, rows: np.ndarray) -> JoinedRows:
        """The same parts with these of their rows, (n,) int64 in ascending order."""
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
        """The rows `[start, stop)` as (part, first, last) with rows counted from the beginning of the part."""
        return [
            (i, max(start, first) - first, min(stop, last) - first)
            for i, (first, last) in enumerate(zip(self.bounds, self.bounds[1:], strict=False))
            if max(start, first) < min(stop, last)
        ]

    def few_groups(self, start: int, stop: int, most: int) -> list[range]:
        """The rows `[start, stop)`; of a part that is read by row group those of at most so many row groups."""
        found = []
        for i, first, last in self.pieces(start, stop):
            part, before = self.parts[i], self.bounds[i]
            near = part.few_groups(first, last, most) if isinstance(part, ParquetRows) else [range(first, last)]
            found += [range(rows.start + before, rows.stop + before) for rows in near]
        return found


def parts_of(rows: Rows) -> tuple[OneRows, ...]:
    """The data sets that rows are made of."""
    return rows.parts if isinstance(rows, JoinedRows) else (rows,)


def with_partial_columns(rows: Rows, only: Collection[str] | None = None) -> Rows:
    """The same rows with the columns that only some Parquet files have: rows of the other files hold null there.

    Args:
        rows: the files of one split.
        only: the columns that count; None: all.
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
    """Whether a row is read with its row group, of some rows at least."""
    return isinstance(rows, ParquetRows) or (isinstance(rows, JoinedRows) and rows.in_place)
