"""Named points of a capture at which a test may kill the process, or let another process run first.

The points do nothing unless a hook is set. Only code can set a hook: no environment variable, file
or flag does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

#: The points in the order in which a capture reaches them. `written`: the temporary file is
#: complete; `synced`: it is fsynced; `named`: it has its final name, and the directory is fsynced
#: too.
POINTS = (
    "plan:written",
    "plan:synced",
    "plan:named",
    "tokenizer:written",
    "tokenizer:named",
    "shard:encoded",
    "shard:row-group",
    "shard:written",
    "shard:synced",
    "shard:named",
    "receipt:written",
    "receipt:synced",
    "receipt:named",
    "report:written",
    "report:synced",
    "report:named",
    "card:written",
    "card:synced",
    "card:named",
    "manifest:written",
    "manifest:synced",
    "manifest:named",
)

_hooks: list[Callable[[str], None]] = []


def reached(point: str) -> None:
    """Call the hooks with the name of a point that was reached."""
    for hook in _hooks:
        hook(point)


@contextlib.contextmanager
def hooked(hook: Callable[[str], None]) -> Iterator[None]:
    """Call `hook` at every point; forked processes inherit it."""
    _hooks.append(hook)
    try:
        yield
    finally:
        _hooks.remove(hook)


def kind_of(path: Path) -> str:
    """Return the kind of a cache's file, as the names of the points use it."""
    if path.suffix == ".parquet":
        return "shard"
    if path.parent.name == "receipts":
        return "plan" if path.name == "plan.json" else "receipt"
    return {"manifest.json": "manifest", "README.md": "card", "tokenizer": "tokenizer"}.get(path.name, "report")
