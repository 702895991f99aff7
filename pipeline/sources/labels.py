"""Class labels: from what a data set writes, names or numbers, to the ids that a model has."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.errors import SourceError
from pipeline.sources.batches import UNREADABLE, read_rows
from pipeline.sources.columns import check_label
from pipeline.sources.source import Source

logger = logging.getLogger(__name__)

#: Larger numbers are row ids or prices, not classes.
_MAX_CLASSES = 100_000


@dataclass(frozen=True, slots=True)
class LabelMap:
    """Raw values of a label column -> class ids."""

    source: str
    """Name of the source, for messages."""
    ids: Mapping[str, int]
    """Class name -> id."""
    class_names: Mapping[str, tuple[str, ...]]
    """Split -> names of its `ClassLabel` column, where it has one and all its names are known."""

    @classmethod
    def for_names(cls, source: Source, names: tuple[str, ...]) -> LabelMap:
        """A map to positions in `names`.

        Text is looked up. Integers are positions; those of a `ClassLabel` are looked up by its names, if `names` has all of them.

        Raises:
            SourceError: a label column of another type.
        """
        column = source.columns.label
        class_names: dict[str, tuple[str, ...]] = {}
        for split, dataset in source.splits.items():
            if column is None or column not in dataset.column_names:
                continue
            check_label(f"{source.name}: split {split}", dataset, column)
            found = getattr(dataset.features[column], "names", None)
            if found is not None and set(found) <= set(names):
                class_names[split] = tuple(found)
            elif found is not None and len(found) != len(names):
                raise SourceError(
                    f"{source.name}: split {split}: expected the model's {len(names)} labels ({', '.join(names[:5])}), found {len(found)} ({', '.join(found[:5])}); "
                    "rename the data's labels to the model's"
                )
            elif found is not None and names != tuple(f"LABEL_{i}" for i in range(len(names))):
                logger.warning(
                    "%s: split %s: the data's labels (%s) are not the model's (%s); they are matched by number: make sure that the order is the same",
                    *(source.name, split, ", ".join(found[:5]), ", ".join(names[:5])),
                )
        return cls(source.name, {name: i for i, name in enumerate(names)}, class_names)

    def class_id(self, value: object, *, split: str, row: int) -> int | None:
        """The class, or None: null, NaN and -1 mean unlabelled.

        Raises:
            SourceError: a name that is not known, a number that is no class.
        """
        where = f"{self.source}: split {split}, row {row}"
        if isinstance(value, str):
            if value not in self.ids:
                raise SourceError(f"{where}: unknown label {value!r}; expected one of {self._known()}; {_MEND}")
            return self.ids[value]
        number = _whole_number(value, where)
        if number is None:
            return None
        names = self.class_names.get(split)
        limit = len(self.ids) if names is None else len(names)
        if not 0 <= number < limit:
            raise SourceError(
                f"{where}: label {number} out of range; expected 0 to {limit - 1} ({self._known()}); {_MEND}"
            )
        return number if names is None else self.ids[names[number]]

    def _known(self) -> str:
        names = list(self.ids)
        return ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")


def label_names(source: Source) -> tuple[str, ...]:
    """Names of the classes that a data set has, in the order of their ids.

    Returns:
        The names of a `ClassLabel` column; else the distinct texts of all splits, sorted; else "0" to the largest number.

    Raises:
        SourceError: no label column, no labelled row, both names and numbers, or numbers that are no classes.
    """
    column = source.columns.label
    if column is None:
        raise SourceError(f"{source.name}: no label column; name it with --label-column")
    for split, dataset in source.splits.items():
        check_label(f"{source.name}: split {split}", dataset, column)
        if column in dataset.column_names and (names := getattr(dataset.features[column], "names", None)):
            return tuple(names)
    texts: dict[str, str] = {}
    largest, number_at = -1, ""
    for where, value in _labels(source, column):
        if isinstance(value, str):
            texts.setdefault(value, where)
        elif (number := _whole_number(value, where)) is not None:
            if not 0 <= number < _MAX_CLASSES:
                raise SourceError(f"{where}: label {number} is no class; expected 0 to {_MAX_CLASSES - 1}; {_MEND}")
            largest, number_at = max(largest, number), number_at or where
        if texts and number_at:
            raise SourceError(
                f"{where}: found both names and numbers in column {column!r} (a number at {number_at}); use one or the other"
            )
    if texts:
        return tuple(sorted(texts))
    if largest < 0:
        raise SourceError(
            f"{source.name}: no labelled row in column {column!r}; label some rows, or name another column with --label-column"
        )
    return tuple(str(i) for i in range(largest + 1))


_MEND = "mend the row, or name another column with --label-column"


def _labels(source: Source, column: str) -> Iterator[tuple[str, object]]:
    for split, dataset in source.splits.items():
        for i, row in enumerate(read_rows(dataset, [column])):
            yield f"{source.name}: split {split}, row {i}", row.get(column)


def _whole_number(value: object, where: str) -> int | None:
    """An integer from an integer, a boolean or a whole float; None from null, NaN and -1."""
    if value is None or value is UNREADABLE or value == -1 or value != value:
        return None
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise SourceError(f"{where}: label {value!r} is no class; expected a name or a whole number; {_MEND}")
