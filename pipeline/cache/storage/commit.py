"""The commit protocol: whatever happens, a file under its final name is whole.

Write under a temporary name in the same directory, fsync, rename, fsync the directory. Temporary
files of killed runs are swept by the next one. `crash` names the points between these steps, for
the tests that kill a capture at each.
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
#: Process number, and eight digits that stand for the machine: on a shared disk, only a machine
#: knows which of its processes live.
_TEMPORARY = re.compile(r"\.tmp-(\d+)-([0-9a-f]{8})-.")
#: After so long a temporary file of another machine is nobody's any more.
_SECONDS_FOREIGN = 7 * 86_400


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, then give it its final name.

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
    """`write_atomically` for a small text file."""
    write_atomically(path, lambda temporary: _write(temporary, text))


def write_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary directory, then give it its final name, unless another writer was first.

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
    """Create a file whole, unless it is there. Of two racing writers one gets True."""
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
    """Where this process writes what will have that name."""
    return path.with_name(f"{_PREFIX}{os.getpid()}-{_machine()}-{path.name}")


def sweep(directory: Path) -> None:
    """Remove what killed runs have left half-written."""
    for orphan in directory.glob(f"{_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            if _is_orphan(orphan):
                shutil.rmtree(orphan) if orphan.is_dir() else orphan.unlink()


def full_disk(path: Path, error: BaseException) -> CacheError:
    """What could not be written, and why, in one line."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "os error 28" in str(error):
        why = "the disk is full" if number != errno.EFBIG else "the file is larger than this disk or account allows"
        return CacheError(
            f"{path}: {why}; what was written before is whole: free some space, then run the same command again"
        )
    return CacheError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})")


def _is_orphan(path: Path) -> bool:
    """Whether the process that wrote it is gone, or was on another machine, long ago."""
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
        # A disk that is full, or gone, may refuse this too; the next run sweeps.
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
