"""A bounded local store for downloaded parts of caches, with least-recently-used eviction."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

from pipeline.cache.storage.commit import write_atomically

#: Share of the bound that is in use after a clean-up, so that the next one is not due at once.
_KEPT = 0.9
#: Share of the bound that may be written before the directory is scanned again, since other
#: processes write to it too.
_LOOK = 0.05

DEFAULT_BYTES = 20_000_000_000


def default_directory() -> Path:
    """Return the directory `softlabel` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softlabel"


class Store:
    """Stores pieces of files by name.

    Several processes may share a directory; a name always stands for the same bytes.
    """

    def __init__(self, directory: Path, max_bytes: int = DEFAULT_BYTES) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self._used: int | None = None
        """Bytes in the directory at the last scan; None: not scanned yet."""
        self._written = 0
        self._lock = threading.Lock()

    def read(self, name: str) -> bytes | None:
        """Return a piece and mark it as recently used, or None if it is not stored."""
        path = self._path(name)
        try:
            data = path.read_bytes()
            os.utime(path, ns=(now := time.time_ns(), now))  # finer than the kernel's default clock
        except FileNotFoundError:
            return None
        return data

    def holds(self, name: str) -> bool:
        """Whether a piece is stored."""
        return self._path(name).is_file()

    def write(self, name: str, data: bytes) -> None:
        """Store a piece, and evict others if the bound is exceeded.

        Raises:
            CacheError: the disk is full, or the directory cannot be written.
        """
        write_atomically(self._path(name), lambda temporary: _write(temporary, data))
        with self._lock:
            self._written += len(data)
            if self._used is None or self._written > min(self.max_bytes - self._used, _LOOK * self.max_bytes):
                self._used, self._written = self._clean(), 0

    def drop(self, name: str) -> None:
        """Delete a piece."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.directory / name

    def _clean(self) -> int:
        """Remove pieces until the rest is within the bound, and return the bytes of the rest."""
        found = []
        for path in self.directory.glob("*/pieces/*/*"):
            with contextlib.suppress(FileNotFoundError):  # another process cleans up too
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        used = sum(size for _, size, _ in found)
        if used > self.max_bytes:
            for _, size, path in sorted(found):
                if used <= _KEPT * self.max_bytes:
                    break
                path.unlink(missing_ok=True)
                used -= size
        return used

    def __getstate__(self) -> dict[str, object]:
        return {"directory": self.directory, "max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
