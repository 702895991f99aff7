"""Named points of a capture at which a test may end the process, or let another one go first.

They do nothing unless a hook is set, and only code can set one: no variable of the environment, no
file, no flag.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

#: In the order in which a capture comes by them. `written`: the temporary file is whole; `synced`:
#: it is on the disk; `named`: it has its final name, and the directory is on the disk too.
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
    """Tell the hook, if there is one, that the capture has come here."""
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
    """What a file of a cache is, as the points name it."""
    if path.suffix == ".parquet":
        return "shard"
    if path.parent.name == "receipts":
        return "plan" if path.name == "plan.json" else "receipt"
    return {"manifest.json": "manifest", "README.md": "card", "tokenizer": "tokenizer"}.get(path.name, "report")
