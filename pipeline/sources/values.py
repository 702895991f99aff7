"""Values of a row as text and lists, with what was found where they are something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.errors import BadRowError


def read_text(name: str, value: object, *, may_be_empty: bool = False) -> str:
    """A value as text that is valid Unicode.

    Raises:
        BadRowError: null, another type, empty unless that is allowed, or a lone surrogate. `name`
            begins the message.
    """
    if value is None:
        raise BadRowError(f"{name} is null")
    if not isinstance(value, str):
        raise BadRowError(f"{name}: expected text, found {kind_of(value)}")
    if not value and not may_be_empty:
        raise BadRowError(f"{name} is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRowError(f"{name}: text that is not valid Unicode (a lone surrogate)") from None
    return value


def without_nulls(value: object) -> object:
    """The same value without the keys that are null: Arrow fills them in where rows have different keys."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def kind_of(value: object) -> str:
    """The type of a value, for messages."""
    return "null" if value is None else type(value).__name__


def fields_of(value: object, names: Sequence[str]) -> tuple[object, ...] | None:
    """Some fields of a struct of lists, or as lists those of a list of structs; None: it is neither."""
    if isinstance(value, Mapping):
        return tuple(value.get(name) for name in names)
    if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        return tuple([each.get(name) for each in value] for name in names)
    return None
