"""Read values of a row as text or lists, with errors that describe the value that was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.errors import BadRowError


def read_text(name: str, value: object, *, may_be_empty: bool = False) -> str:
    """Return a value that must be text in valid Unicode.

    Raises:
        BadRowError: the value is null, of another type, has a lone surrogate, or is empty and
            `may_be_empty` is False; the message begins with `name`.
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
    """Remove null keys from structs: Arrow adds them where rows have different keys."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def kind_of(value: object) -> str:
    """Return the name of a value's type, for messages."""
    return "null" if value is None else type(value).__name__


def fields_of(value: object, names: Sequence[str]) -> tuple[object, ...] | None:
    """Return the fields of a struct, or of a list of structs as lists; None: it is neither."""
    if isinstance(value, Mapping):
        return tuple(value.get(name) for name in names)
    if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        return tuple([each.get(name) for each in value] for name in names)
    return None
