"""Read the scores of rows, one per model output, and the lists in which rows are ranked."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pipeline.errors import BadRowError, SourceError
from pipeline.records import LabelColumn
from pipeline.sources.batches import UNREADABLE, read_rows
from pipeline.sources.columns import check_label
from pipeline.sources.inputs.answers import AnswerColumn
from pipeline.sources.label_names import label_names
from pipeline.sources.labels import LabelMap
from pipeline.sources.source import Source
from pipeline.sources.values import kind_of

#: The readers of a label column.
Labels: TypeAlias = "LabelMap | ScoreColumn | AnswerColumn"

_LARGEST = 3.0e38  # about the maximum of float32


@dataclass(frozen=True, slots=True)
class ScoreColumn:
    """Reads raw values of a label column as scores."""

    outputs: int
    """Number of scores of a row."""

    lone: frozenset[tuple[str, int]] = frozenset()
    """(split, list id) of each list with a single row; such rows are bad rows."""

    contract_form: tuple[str, ...] = ()
    """Empty: scores have no label map."""
    several: bool = True
    """Whether rows get unknown scores if there is no label column."""

    @classmethod
    def of(cls, source: Source, outputs: int, label_map: Sequence[str] = ()) -> ScoreColumn:
        """Make a reader of a source's label column, for a model with `outputs` outputs.

        Raises:
            SourceError: the column has another type, a label map is given, or the rows of a list
                are not consecutive.
        """
        if label_map:
            raise SourceError(f"{source.name}: --label-map is for class labels, and here they are scores; leave it out")
        for split, dataset in source.splits.items():
            check_label(f"{source.name}: split {split}", dataset, source.columns, holds="scores")
        return cls(outputs, frozenset() if source.columns.group is None else _lone(source))

    def list_of(self, value: object, split: str) -> int:
        """Return the id of the list that a row belongs to.

        Raises:
            BadRowError: the value is null, or the list has only this row.
        """
        if value is None or value is UNREADABLE:
            raise BadRowError("expected a name or a number, found null")
        found = group_id(value)
        if (split, found) in self.lone:
            raise BadRowError(f"{value!r} is a list of one row, which has nothing to be ranked against")
        return found

    def read(self, value: object) -> tuple[float, ...]:
        """Return one float for each output; nan if it is not known.

        Raises:
            BadRowError: the number of scores differs from the number of outputs, or a score is no
                number or too large for float32.
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


def head_names(source: Source, label_map: Sequence[str] = (), *, holds: LabelColumn = "class") -> tuple[str, ...]:
    """Return the names of the classes or outputs that the head of a new model needs.

    Raises:
        SourceError: see `label_names` and `score_names`.
    """
    if holds == "answers":
        return ()
    return score_names(source) if holds == "scores" else label_names(source, label_map, several=holds == "classes")


def label_reader(
    source: Source, names: Sequence[str], label_map: Sequence[str] = (), *, holds: LabelColumn = "class"
) -> Labels:
    """Make the reader of a source's label column, for a model with these class or output names.

    Raises:
        SourceError: see `LabelMap.for_names`, `ScoreColumn.of` and `AnswerColumn.of`.
    """
    if holds == "scores":
        return ScoreColumn.of(source, len(names), label_map)
    if holds == "answers":
        return AnswerColumn.of(source, label_map)
    return LabelMap.for_names(source, tuple(names), label_map, several=holds == "classes")


def group_id(value: object) -> int:
    """Hash the value that the rows of one list share, to an integer in [0, 2^63)."""
    text = str(value).encode("utf-8", errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def list_starts(source: Source) -> dict[str, list[int]]:
    """Return the first row of each list, by split; {} if the rows do not form lists."""
    return {split: list(_starts(source, split)) for split in source.splits} if source.columns.group is not None else {}


def _starts(source: Source, split: str) -> Iterator[int]:
    name, before = source.columns.group or "", object()
    for i, row in enumerate(read_rows(source.splits[split], [name])):
        if i == 0 or row[name] != before:
            yield i
        before = row[name]


def _lone(source: Source) -> frozenset[tuple[str, int]]:
    """Return (split, list id) of each list with a single row.

    Raises:
        SourceError: the rows of a list are not consecutive.
    """
    name, found = source.columns.group or "", set()
    for split, dataset in source.splits.items():
        sizes: Counter[int] = Counter()
        before: int | None = None
        for i, row in enumerate(read_rows(dataset, [name])):
            if row[name] is None or row[name] is UNREADABLE:
                continue
            group = group_id(row[name])
            if group != before and group in sizes:
                raise SourceError(
                    f"{source.name}: split {split}: column {name!r} (--group-column): the rows of {row[name]!r} are not consecutive: row {i} is separate; sort the rows by the column"
                )
            sizes[group] += 1
            before = group
        found |= {(split, group) for group, size in sizes.items() if size == 1}
    return frozenset(found)


def score_names(source: Source) -> tuple[str, ...]:
    """Return names for the outputs of a model of a data set's scores.

    The name is that of the label column, with a number appended if the column holds lists.

    Raises:
        SourceError: there is no label column, no row with a score, or lists differ in length.
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
