"""What several tests begin with, made once and copied.

Teachers, caches, whatever is a folder of files.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Hashable
from pathlib import Path

_MADE: dict[Hashable, Path] = {}


def once(key: Hashable, make: Callable[[Path], object], folder: Path) -> None:
    """Fill `folder` with what `make` puts into an empty one.

    `make` runs the first time that this process meets `key`.

    A test may change or delete its copy. Files keep their times; directories that are there already
    are filled up.
    """
    if key not in _MADE:
        made = Path(tempfile.mkdtemp(prefix="once-"))
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        make(made)
        _MADE[key] = made
    shutil.copytree(_MADE[key], folder, dirs_exist_ok=True)
