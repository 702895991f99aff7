"""Atomic writes: a file that exists under its final name is complete, even after a crash.

A file is written under a temporary name in the same directory, fsynced and renamed; then the
directory is fsynced. The next run removes the temporary files of killed runs. Tests kill a capture
at each of the points that `crash` names between these steps.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.cache.storage.crash import kind_of, reached
from pipeline.errors import CacheError

_PREFIX = ".tmp-"
#: Process number, and eight hexadecimal digits that identify the machine: on a shared disk, a
#: machine can only check its own processes.
_TEMPORARY = re.compile(r"\.tmp-(\d+)-([0-9a-f]{8})-.")
#: Age in seconds after which a temporary file of another machine counts as abandoned.
_SECONDS_FOREIGN = 7 * 86_400


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path, then rename the file to its final name.

    Raises:
        CacheError: the disk is full, or the directory cannot be written; nothing is left behind.
    """
    kind = kind_of(path)
    with _temporary(path) as temporary:
        write(temporary)
        reached(f"{kind}:written")
        _sync(temporary)
        reached(f"{kind}:synced")
        os.replace(temporary, path)
        _sync(path.parent)
    reached(f"{kind}:named")


def write_text(path: Path, text: str) -> None:
    """Write a small text file with `write_atomically`."""
    write_atomically(path, lambda temporary: _write(temporary, text))


def write_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary directory, then rename it, unless the final name exists.

    Raises:
        CacheError: the disk is full, or the directory cannot be written; nothing is left behind.
    """
    kind = kind_of(path)
    with _temporary(path) as temporary:
        write(temporary)
        reached(f"{kind}:written")
        for part in (*temporary.rglob("*"), temporary):
            _sync(part)
        try:
            os.replace(temporary, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        _sync(path.parent)
    reached(f"{kind}:named")


def create_exclusively(path: Path, text: str) -> bool:
    """Create a complete file if it does not exist; of two racing writers, one gets True."""
    kind = kind_of(path)
    with _temporary(path) as temporary:
        _write(temporary, text)
        reached(f"{kind}:written")
        _sync(temporary)
        reached(f"{kind}:synced")
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        _sync(path.parent)
        reached(f"{kind}:named")
    return True


def temporary_path(path: Path) -> Path:
    """Return the temporary path under which this process writes `path`."""
    return path.with_name(f"{_PREFIX}{os.getpid()}-{_machine()}-{path.name}")


def sweep(directory: Path) -> None:
    """Remove the temporary files of killed runs."""
    for orphan in directory.glob(f"{_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            if _is_orphan(orphan):
                shutil.rmtree(orphan) if orphan.is_dir() else orphan.unlink()


def full_disk(path: Path, error: BaseException) -> CacheError:
    """Return a one-line error that names what could not be written, and why."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "os error 28" in str(error):
        why = "the disk is full" if number != errno.EFBIG else "the file is larger than this disk or account allows"
        return CacheError(
            f"{path}: {why}; files written before are complete: free some space, then run the same command again"
        )
    return CacheError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})")


def _is_orphan(path: Path) -> bool:
    """Whether the process that wrote a temporary file has ended, or the file is old and foreign."""
    found = _TEMPORARY.match(path.name)
    if found is None or found[2] != _machine():
        return time.time() - path.lstat().st_mtime > _SECONDS_FOREIGN
    number = int(found[1])
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return number == os.getpid()


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        raise full_disk(path, error) from error
    finally:
        # A disk that is full or disconnected may refuse this too; then the next run sweeps.
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
