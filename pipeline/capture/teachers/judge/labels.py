"""The labels that a language model chooses from: their names and their texts."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from pipeline.errors import MisuseError, SourceError
from pipeline.sources import Source, label_names
from pipeline.sources.labels import is_number

_GIVE = "give each class with --label-text NAME=TEXT"


def labels_of(
    source: Source, label_text: Sequence[str], label_map: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names and texts of the classes, in the order of their ids.

    Args:
        label_text: `NAME=TEXT`, or `NAME` for both. Empty: the names of the data's labels.

    Raises:
        MisuseError: fewer than two labels, a label that is given twice or without a text, or
            numeric labels of the data.
        SourceError: the data's labels cannot be read.
    """
    if label_text:
        pairs = [_pair(item) for item in label_text]
    else:
        if source.columns.label is None:
            raise MisuseError(f"{source.name}: has no label column to take the names of the labels from; {_GIVE}")
        try:
            names = label_names(source, label_map)
        except SourceError as error:
            raise SourceError(f"{error} (or {_GIVE})") from None
        number = next((name for name in names if is_number(name)), None)
        if number is not None:
            raise MisuseError(
                f"{source.name}: the data's labels are numbers ({', '.join(names[:5])}), which have no meaning for a language model; "
                f"{_GIVE}, as --label-text {number}=sport"
            )
        pairs = [(name, name) for name in names]
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise MisuseError(f"--label-text {twice}: the class is given twice; give it once")
    if len(found) < 2:
        raise MisuseError(f"--label-text: expected at least 2 classes, found {', '.join(found) or 'none'}; {_GIVE}")
    return tuple(found), tuple(found.values())


def _pair(item: str) -> tuple[str, str]:
    name, separator, text = item.partition("=")
    if not separator:
        text = name
    if not name.strip() or not text.strip() or any(unicodedata.category(c) == "Cc" for c in item):
        raise MisuseError(f"--label-text: expected NAME=TEXT, both on one line and not empty, found {item!r}")
    return name, text
