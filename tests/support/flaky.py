"""A URL file system that counts reads, and fails, stalls or corrupts data on demand.

`flaky://PATH` is the local PATH.
"""

from __future__ import annotations

import time
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from pipeline.cache.storage import transfer


class FlakyFileSystem(LocalFileSystem):
    protocol = "flaky"
    cachable = False
    log: ClassVar[list[tuple[str, int]]] = []
    """Name and bytes of each file or range that was read."""
    written: ClassVar[list[str]] = []
    failures = 0
    """Number of the next requests that fail; -1: all."""
    stalls = 0
    """Number of the next requests that take a second."""
    damaged = 0
    """Number of the next ranges that have a flipped bit in the middle."""
    die_after: int | None = None
    """Number of requests after which every request fails."""

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(str(path).removeprefix("flaky://"))

    @classmethod
    def _request(cls):
        if cls.die_after is not None:
            cls.die_after -= 1
            if cls.die_after < 0:
                raise ConnectionError("the cable is cut")
        if cls.failures:
            cls.failures -= 1
            raise ConnectionResetError("connection reset by peer")
        if cls.stalls:
            cls.stalls -= 1
            time.sleep(1.0)

    def ls(self, path, detail=False, **kwargs):
        self._request()
        return super().ls(path, detail=detail)

    def cat_file(self, path, start=None, end=None, **kwargs):
        self._request()
        data = super().cat_file(path, start=start, end=end)
        type(self).log.append((str(path).rpartition("/")[2], len(data)))
        if type(self).damaged and str(path).endswith(".parquet"):
            type(self).damaged -= 1
            flipped = bytearray(data)
            flipped[len(data) // 2] ^= 4
            data = bytes(flipped)
        return data

    def put_file(self, path1, path2, callback=None, **kwargs):
        self._request()
        self.makedirs(self._parent(path2), exist_ok=True)
        type(self).written.append(str(path2).rpartition("/")[2])
        return super().put_file(path1, path2)

    @classmethod
    def fetched(cls) -> int:
        """Return the number of bytes of shards that were read."""
        return sum(size for name, size in cls.log if name.endswith(".parquet"))


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> type[FlakyFileSystem]:
    """Register the file system, and return its class with reset counters and no retry delays."""
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    for name, value in (("failures", 0), ("stalls", 0), ("damaged", 0), ("die_after", None)):
        monkeypatch.setattr(FlakyFileSystem, name, value)
    monkeypatch.setattr(FlakyFileSystem, "log", [])
    monkeypatch.setattr(FlakyFileSystem, "written", [])
    monkeypatch.setattr(transfer, "WAITS", (0.0, 0.0, 0.0))
    return FlakyFileSystem
