"""Read the choices of a row and the correct one, and count the largest number of choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.errors import BadRowError, MisuseError
from pipeline.progress import track
from pipeline.sources.batches import Row, read_rows
from pipeline.sources.values import fields_of, kind_of, read_text

if TYPE_CHECKING:
    from pipeline.sources.source import Source

#: Maximum number of choices of a row.
_MOST = 64


def read_choices(columns: Sequence[str], row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Read the choices of a row, and their names in the data.

    Args:
        columns: a column of lists of texts, of {text: texts, label: names} or of lists of {text,
            label}; or one column for each choice.

    Returns:
        (C,) texts; (C,) names, or () if they have none.

    Raises:
        BadRowError: there are fewer than 2 choices or more than 64, one is no text, or the number
            of names differs from that of choices; the message begins with the column's name.
    """
    if len(columns) > 1:
        values = [row[name] for name in columns]
        while values and values[-1] is None:  # a row may have fewer
            values.pop()
        return _texts(f"{columns[0]} to {columns[-1]}", values), ()
    (name,) = columns
    value, names = fields_of(row[name], ("text", "label")) or (row[name], None)
    if not isinstance(value, list):
        raise BadRowError(f"{name} is null" if value is None else f"{name}: expected a list, found {kind_of(value)}")
    texts = _texts(name, value)
    called = tuple(str(each).strip() for each in names) if isinstance(names, list) and None not in names else ()
    if called and len(called) != len(texts):
        raise BadRowError(f"{name}: expected a label for each of {len(texts)} choices, found {len(called)}")
    return texts, called


def _texts(name: str, values: Sequence[object]) -> tuple[str, ...]:
    if not 2 <= len(values) <= _MOST:
        raise BadRowError(f"{name}: expected 2 to {_MOST} choices, found {len(values)}")
    return tuple(read_text(f"{name}[{i}]", value) for i, value in enumerate(values))


def read_choice(name: str, value: object, texts: Sequence[str], names: Sequence[str]) -> int | None:
    """Return the index of the correct choice; None: not known.

    Args:
        name: name of the column, for messages.
        value: a number from 0, a letter from A, the name of a choice in the data, or its text; null
            and -1: not known.
        texts: (C,) the choices.
        names: (C,) their names in the data, or ().

    Raises:
        BadRowError: the value matches no choice, or several.
    """
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BadRowError(f"{name}: expected the number, letter or text of a choice, found {kind_of(value)}")
    whole = isinstance(value, float) and math.isfinite(value) and value == int(value)
    said = str(int(value) if whole else value).strip()
    number = _number_of(said, names)
    for known in (list(names), [text.strip() for text in texts] if isinstance(value, str) else []):
        if known.count(said) > 1:
            raise BadRowError(f"{name}: {said!r} names {known.count(said)} of the choices")
        if said not in known:
            continue
        found = known.index(said)
        if not names and 0 <= number < len(texts) and number != found:
            raise BadRowError(
                f"{name}: {value!r} is ambiguous: it is the text of choice {found + 1} and the {'number, from 0,' if said.isdecimal() else 'letter'} of choice {number + 1}; "
                "give numbers as integers, or a name to each choice: {text: [...], label: [...]}"
            )
        return found
    if said == "-1":
        return None
    if not 0 <= number < len(texts):
        expected = (
            f"one of {', '.join(names)}" if names else f"0 to {len(texts) - 1}, A to {chr(ord('A') + len(texts) - 1)}"
        )
        raise BadRowError(f"{name}: expected {expected}, or the text of a choice, found {value!r}")
    return number


def _number_of(said: str, names: Sequence[str]) -> int:
    """Convert a number or a letter to an index from 0; -1: it is neither."""
    if said.isascii() and said.isdecimal() and not _are_numbers(names):
        return int(said)
    return ord(said.upper()) - ord("A") if len(said) == 1 and said.isalpha() and said.isascii() else -1


def _are_numbers(names: Sequence[str]) -> bool:
    """Return whether the names in the data are numbers; a number then is a name, not an index."""
    return bool(names) and all(name.isdecimal() for name in names)


def most_choices(source: Source) -> int:
    """Return the largest number of choices of a row in any split: the classes of a cache.

    Only the columns of choices are read.

    Raises:
        MisuseError: no row has two choices.
    """
    columns, most = source.columns.choices, 0
    if len(columns) > 1:
        return len(columns)
    for split, dataset in source.splits.items():
        for row in track(read_rows(dataset, list(columns)), f"choices of {split}", len(dataset), stride=64):
            try:
                most = max(most, len(read_choices(columns, row)[0]))
            except BadRowError:  # reported when the row is read
                continue
    if not most:
        raise MisuseError(f"{source.name}: no row has two choices in column {columns[0]!r} (--choices-column)")
    return most
