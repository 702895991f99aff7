"""Data sets one after another, read as one: labelled rows first, then rows without labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pipeline.sources.files.parquet import ParquetRows

if TYPE_CHECKING:
    from datasets import Dataset

#: The rows of one data set: an Arrow table of `datasets`, or Parquet files that are read in place.
OneRows: TypeAlias = "Dataset | ParquetRows"
#: The rows of one split: of one data set, or of several.
Rows: TypeAlias = "OneRows | JoinedRows"


class JoinedRows:
    """The rows of several data sets in order. Columns and types are those of the first; the label is that of the first alone."""

    def __init__(self, parts: Sequence[OneRows], label: str | None) -> None:
        self.parts = tuple(parts)
        self.label = label
        """The column that is read of the first part alone."""
        self.features: Any = parts[0].features
        self.bounds: list[int] = np.cumsum([0, *(len(part) for part in parts)]).tolist()
        """(parts + 1,): the first row of each."""

    def __len__(self) -> int:
        return self.bounds[-1]

    @property
    def column_names(self) -> list[str]:
        """Columns of the first part."""
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


def is_in_place(rows: Rows) -> bool:
    """Whether a row is read with its row group, of some rows at least."""
    return isinstance(rows, ParquetRows) or (isinstance(rows, JoinedRows) and rows.in_place)
