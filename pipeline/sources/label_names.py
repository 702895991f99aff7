"""Find the class names of a data set, from which the head of a new teacher is built."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from pipeline.errors import SourceError
from pipeline.sources.batches import read_rows
from pipeline.sources.columns import check_label, class_names, holds_flags, holds_spans
from pipeline.sources.inputs.words import tags_of
from pipeline.sources.labels import MEND, Names, fold, listed, order, raw_labels, sides, whole_number
from pipeline.sources.source import Source

if TYPE_CHECKING:
    from pipeline.sources.files.joined import Rows

logger = logging.getLogger(__name__)

#: Numbers from here on are taken for row ids or prices, not classes.
_MAX_CLASSES = 100_000
#: Classes with fewer labelled rows are rare: they are too few to learn from, or misspelt.
FEW_ROWS = 5


def label_names(source: Source, label_map: Sequence[str] = (), *, several: bool = False) -> tuple[str, ...]:
    """Return the class names of a data set, in the order of their ids.

    Args:
        label_map: `DATA=MODEL` each: the label DATA becomes the class named MODEL.
        several: a row has several labels at once.

    Returns:
        The names of a `ClassLabel` column; else the distinct texts of all splits, sorted (numbers
        as numbers); else "0" to the largest number. For spans, the tags of words: "O", and each
        label with the prefixes "B-" and "I-".

    Raises:
        SourceError: there is no label column or no labelled row; the labels are both names and
            numbers, or numbers that cannot be classes; lists of numbers differ in length; or a DATA
            of the label map is no label.
    """
    column = source.columns.label
    if column is None:
        raise SourceError(f"{source.name}: no label column; name it with --label-column")
    given = _Renamed(label_map)
    names = _found_names(source, column, given, several=several)
    given.check_used(source)
    return names


def _found_names(source: Source, column: str, given: _Renamed, *, several: bool) -> tuple[str, ...]:
    for split, dataset in source.splits.items():
        check_label(f"{source.name}: split {split}", dataset, source.columns, holds="classes" if several else "class")
        if column in dataset.column_names and (names := class_names(dataset.features[column])):
            renamed = [given.name(name, str(i)) for i, name in enumerate(names)]
            return _distinct(tags_of(renamed) if holds_spans(dataset, column) else renamed, source, column)
    wide = [
        len(value)
        for split in source.splits.values()
        if several and holds_flags(split, column)
        for value in _lists(split, column)
    ]
    if wide:
        if min(wide) < max(wide):
            raise SourceError(
                f"{source.name}: column {column!r}: expected lists of one number for each class, found lists of {min(wide)} and of {max(wide)}"
            )
        return _distinct([given.name(str(i)) for i in range(wide[0])], source, column)
    texts: dict[str, str] = {}
    numbers: set[int] = set()
    number_at = ""
    for where, value in raw_labels(source, column):
        if isinstance(value, str):
            texts.setdefault(value, where)
        elif value == -1 and given.has("-1"):
            numbers.add(-1)
        elif (number := whole_number(value, where)) is not None:
            if not 0 <= number < _MAX_CLASSES:
                raise SourceError(f"{where}: label {number} is no class; expected 0 to {_MAX_CLASSES - 1}; {MEND}")
            numbers.add(number)
            number_at = number_at or where
        if texts and number_at:
            raise SourceError(
                f"{where}: found both names and numbers in column {column!r} (a number at {number_at}); use one or the other"
            )
    spans = any(holds_spans(dataset, column) for dataset in source.splits.values())
    if texts:
        found = sorted((given.name(text) for text in texts), key=order)
        return _distinct(tags_of(found) if spans else found, source, column)
    if not numbers:
        raise SourceError(
            f"{source.name}: no labelled row in column {column!r}; label some rows, or name another column with --label-column"
        )
    every = [*([-1] if -1 in numbers else []), *range(max(numbers) + 1)]
    named = [given.name(str(i)) for i in every]
    return _distinct(tags_of(named) if spans else named, source, column)


def _lists(dataset: Rows, column: str) -> Iterator[list[object]]:
    return (value for row in read_rows(dataset, [column]) if isinstance(value := row[column], list))


class _Renamed:
    """Renames labels according to `--label-map`."""

    def __init__(self, label_map: Sequence[str]) -> None:
        pairs = dict(sides(item) for item in label_map)
        self._models = list(pairs.values())
        self._data = Names.of({data: i for i, data in enumerate(pairs)})
        self._seen: dict[str, None] = {}
        self._used: set[int] = set()

    def has(self, *forms: str) -> bool:
        """Return whether a label, written in one of these forms, is renamed."""
        return any(self._data.find(form, "--label-map") is not None for form in forms)

    def name(self, *forms: str) -> str:
        """Return the class name of a label that is written in these forms."""
        self._seen[forms[0]] = None
        found = [i for form in forms if (i := self._data.find(form, "--label-map")) is not None]
        self._used.update(found[:1])
        return self._models[found[0]] if found else forms[0]

    def check_used(self, source: Source) -> None:
        """Raise `SourceError` if a DATA has renamed no label."""
        unknown = [data for data, i in self._data.ids.items() if i not in self._used]
        if unknown:
            raise SourceError(
                f"{source.name}: --label-map: no row has the label {unknown[0]!r}; expected DATA=MODEL with DATA one of {listed(sorted(self._seen, key=order))}"
            )


def _distinct(names: Iterable[str], source: Source, column: str) -> tuple[str, ...]:
    """Remove duplicate names, and warn about names that differ only in case or space."""
    kept = tuple(dict.fromkeys(names))
    first: dict[str, str] = {}
    for name in kept:
        other = first.setdefault(fold(name), name)
        if other != name:
            logger.warning(
                "%s: column %r has the labels %r and %r, which become two classes; if they are one, correct the rows or give --label-map '%s=%s'",
                *(source.name, column, other, name, name, other),
            )
    return kept
