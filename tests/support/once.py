"""Folders of test data that are created once per process and copied for each test.

Used for teachers, caches and other folders of files.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Hashable
from pathlib import Path

_MADE: dict[Hashable, Path] = {}


def once(key: Hashable, make: Callable[[Path], object], folder: Path) -> None:
    """Fill `folder` with a copy of the files that `make` writes to an empty folder.

    `make` runs only on the first call with `key` in this process.

    A test may change or delete its copy. Files keep their modification times, and existing
    directories are merged.
    """
    if key not in _MADE:
        made = Path(tempfile.mkdtemp(prefix="once-"))
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        make(made)
        _MADE[key] = made
    shutil.copytree(_MADE[key], folder, dirs_exist_ok=True)
