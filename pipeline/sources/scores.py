"""Scores of rows: one number, or one for each output of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import BadRowError, SourceError
from pipeline.sources.batches import UNREADABLE, read_rows
from pipeline.sources.columns import check_label
from pipeline.sources.source import Source
from pipeline.sources.values import kind_of

_LARGEST = 3.0e38  # of float32


@dataclass(frozen=True, slots=True)
class ScoreColumn:
    """Raw values of a label column -> scores."""

    outputs: int
    """How many a row has."""

    contract_form: tuple[str, ...] = ()
    """There is nothing to map."""
    several: bool = True
    """Rows without a label column have as many unknown ones."""

    @classmethod
    def of(cls, source: Source, outputs: int, label_map: Sequence[str] = ()) -> ScoreColumn:
        """The label column of a source, read for a model of so many outputs.

        Raises:
            SourceError: a column of another type; a label map.
        """
        if label_map:
            raise SourceError(f"{source.name}: --label-map is for class labels, and here they are scores; leave it out")
        for split, dataset in source.splits.items():
            check_label(f"{source.name}: split {split}", dataset, source.columns, holds="scores")
        return cls(outputs)

    def read(self, value: object) -> tuple[float, ...]:
        """One float for each output; nan for null and nan.

        Raises:
            BadRowError: another number of them, no number, or one that float32 does not hold.
        """
        if value is None or value is UNREADABLE:
            return (math.nan,) * self.outputs
        values = value if isinstance(value, list) else [value]
        if len(values) != self.outputs:
            raise BadRowError(f"expected {self.outputs} scores, as many as the model has outputs, found {len(values)}")
        found = []
        for each in values:
            if each is not None and not isinstance(each, int | float):
                raise BadRowError(f"expected numbers, found {kind_of(each)}")
            found.append(math.nan if each is None else float(each))
        large = next((each for each in found if abs(each) > _LARGEST), None)
        if large is not None:
            raise BadRowError(f"expected finite scores, found {large:g}")
        return tuple(found)


def score_names(source: Source) -> tuple[str, ...]:
    """Names of the outputs that a model of a data set's scores needs: that of the column, with numbers where it holds lists.

    Raises:
        SourceError: no label column, no row with a score, or lists of several lengths.
    """
    column = source.columns.label
    if column is None:
        raise SourceError(f"{source.name}: no label column; name it with --label-column")
    lengths: set[int] = set()
    is_list = False
    for split, dataset in source.splits.items():
        check_label(f"{source.name}: split {split}", dataset, source.columns, holds="scores")
        for row in read_rows(dataset, [column]):
            value = row.get(column)
            is_list |= isinstance(value, list)
            if value is not None:
                lengths.add(len(value) if isinstance(value, list) else 1)
    if not lengths - {0}:
        raise SourceError(
            f"{source.name}: no row with a score in column {column!r}; score some rows, or name another column with --label-column"
        )
    if len(lengths) > 1:
        raise SourceError(
            f"{source.name}: column {column!r}: expected lists of one number for each output, found lists of {min(lengths)} and of {max(lengths)}"
        )
    return tuple(f"{column}_{i}" for i in range(lengths.pop())) if is_list else (column,)
