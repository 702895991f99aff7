"""Texts to choose from: the choices of a row, which of them is right, and how many a row has at most."""

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

#: More choices than any row has.
_MOST = 64


def read_choices(columns: Sequence[str], row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The choices of a row, and what the data calls each.

    Args:
        columns: one with lists of texts, with {text: texts, label: names} or with lists of {text,
            label}; or one for each choice.

    Returns:
        (C,) texts; (C,) names, or () where they have none.

    Raises:
        BadRowError: fewer than two, or one that is no text. The column's name begins the message.
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
    """The number of the right choice, from 0.

    Args:
        name: of the column, for messages.
        value: a number from 0, a letter from A, the data's name of a choice, or its text; null and
            -1: not known.
        texts: (C,).
        names: (C,) the data's, or ().

    Raises:
        BadRowError: it names no choice, or two of them.
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
                f"{name}: {value!r} is the text of choice {found + 1} and the {'number, from 0,' if said.isdecimal() else 'letter'} of choice {number + 1}; "
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
    """What a number or a letter stands for, from 0; -1: it is neither."""
    if said.isascii() and said.isdecimal() and not _are_numbers(names):
        return int(said)
    return ord(said.upper()) - ord("A") if len(said) == 1 and said.isalpha() and said.isascii() else -1


def _are_numbers(names: Sequence[str]) -> bool:
    """Whether the data's own names are numbers, which then do not count from 0."""
    return bool(names) and all(name.isdecimal() for name in names)


def most_choices(source: Source) -> int:
    """The most choices that a row of any split has: the classes of a cache.

    Reads the columns of choices alone.

    Raises:
        MisuseError: no row has two.
    """
    columns, most = source.columns.choices, 0
    if len(columns) > 1:
        return len(columns)
    for split, dataset in source.splits.items():
        for row in track(read_rows(dataset, list(columns)), f"choices of {split}", len(dataset), stride=64):
            try:
                most = max(most, len(read_choices(columns, row)[0]))
            except BadRowError:  # told when the row is read
                continue
    if not most:
        raise MisuseError(f"{source.name}: no row has two choices in column {columns[0]!r} (--choices-column)")
    return most
