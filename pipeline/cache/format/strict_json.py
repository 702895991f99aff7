"""Read JSON from an untrusted source, within size limits.

A cache may be a download. This reader refuses input that Python's own reader accepts: duplicate
keys (which two readers may resolve differently), NaN, nesting that exhausts the interpreter's
stack, and a few megabytes that expand to gigabytes of objects.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import IntegrityError

_MOST_BYTES = 48 << 20
#: Limits for lists and objects, and for their items. A manifest of 100,000 shards has 200,000 lists
#: and objects with 2 million items.
_MOST_CONTAINERS, _MOST_ITEMS = 300_000, 3_000_000


def read_json(path: Path) -> tuple[bytes, Any]:
    """Return the bytes of a JSON file, and the parsed value.

    Raises:
        IntegrityError: the path is not a regular file, or the file is too large or not strict JSON.
    """
    if path.is_symlink() or not path.is_file():
        raise IntegrityError(
            f"{path}: expected a regular file, found {'a symbolic link' if path.is_symlink() else 'none'}"
        )
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise IntegrityError(f"{path}: expected at most {_MOST_BYTES >> 20} MB, found {size >> 20}")
    data = path.read_bytes()
    containers, items = data.count(b"[") + data.count(b"{"), data.count(b",")
    if containers > _MOST_CONTAINERS or items > _MOST_ITEMS:
        raise IntegrityError(
            f"{path}: expected at most {_MOST_CONTAINERS} lists and objects of {_MOST_ITEMS} items in all, found {containers} of {items}"
        )
    try:
        return data, json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise IntegrityError(f"{path}: not JSON of this format: it is nested too deeply") from None
    except ValueError as error:
        raise IntegrityError(f"{path}: not JSON: {' '.join(str(error).split())[:200]}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)[:80]!r} is given twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
