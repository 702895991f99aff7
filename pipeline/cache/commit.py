"""The commit protocol: whatever happens, a file under its final name is whole.

Write under a temporary name in the same directory, fsync, rename, fsync the directory. Temporary files of killed runs are swept by
the next one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.errors import CacheError

_PREFIX = ".tmp-"
#: Whether a process on another machine lives cannot be seen from here: after a day it does not write any more.
_FOREIGN_SECONDS = 24 * 3600


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, then give it its final name.

    Raises:
        CacheError: the disk is full, or the directory cannot be written; nothing is left behind.
    """
    with _temporary(path) as temporary:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_atomically` for a small text file."""
    write_atomically(path, lambda temporary: _write(temporary, text))


def create_exclusively(path: Path, text: str) -> bool:
    """Create a file whole, unless it is there. Of two racing writers one gets True."""
    with _temporary(path) as temporary:
        _write(temporary, text)
        _sync(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        _sync(path.parent)
    return True


def sweep(directory: Path) -> None:
    """Remove what killed runs have left half-written."""
    for orphan in directory.glob(f"{_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            if _is_orphan(orphan):
                shutil.rmtree(orphan) if orphan.is_dir() else orphan.unlink()


def temporary_name(name: str) -> str:
    """What a file is called while it is written: the machine and the process stand in it."""
    return f"{_PREFIX}{_host()}-{os.getpid()}-{name}"


def _is_orphan(path: Path) -> bool:
    """Whether the process that wrote it is gone."""
    host, _, rest = path.name.removeprefix(_PREFIX).partition("-")
    number = rest.partition("-")[0]
    if host != _host() or not number.isdigit():
        return time.time() - path.stat().st_mtime > _FOREIGN_SECONDS
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return int(number) == os.getpid()


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    temporary = path.with_name(temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = (
                "the disk is full; what was written before is whole: free some space, then run the same command again"
            )
        else:
            what = f"cannot be written ({error.strerror or error})"
        raise CacheError(f"{path}: {what}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
