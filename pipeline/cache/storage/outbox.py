"""Write a cache to a URL: each shard is made in a local directory, uploaded, and deleted locally.

The receipts at the URL record which shards are finished. Any number of machines may therefore work
on one cache, and a killed process loses only what it had not uploaded.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pipeline.cache.storage.transfer import create_file, make_parent, patiently
from pipeline.cache.storage.urls import open_filesystem
from pipeline.errors import CacheError
from pipeline.sources.files.loading import reason, redact

#: Timeout for uploading one shard, in seconds.
_SENDING = 3600.0

Result = TypeVar("Result")


class Outbox:
    """Sends the files of one cache to a URL.

    Credentials come from the environment, as the URL's file system reads them.
    """

    def __init__(self, url: str) -> None:
        self.url = redact(url)
        """The URL without credentials, for messages."""
        self.location = url
        """The URL with its credentials, if it has any; never shown."""
        self._filesystem, self._root = open_filesystem(url)
        self.staging = Path(tempfile.mkdtemp(prefix="softlabel-"))
        """The local directory; deleted with this object, or when the process exits."""
        weakref.finalize(self, shutil.rmtree, self.staging, ignore_errors=True)

    def create(self, name: str, text: str) -> bool:
        """Create a complete file at the URL if it does not exist.

        Of two racing writers, one gets True: this is a conditional put. File systems without one
        check first and then write.
        """
        path = f"{self._root}/{name}"
        with self._told(name):
            if self._filesystem.exists(path):
                return False
            return create_file(self._filesystem, path, text.encode())

    def fetch(self, name: str) -> bool:
        """Download a file to its place in the staging directory; False if it does not exist."""
        target = self.staging / name
        with self._told(name):
            try:
                content = self._asked(name, lambda: bytes(self._filesystem.cat_file(f"{self._root}/{name}")))
            except FileNotFoundError:
                return False
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return True

    def fetch_receipts(self) -> None:
        """Download all receipts that are missing locally, which other workers have written."""
        for name in self.names("receipts"):
            if not (self.staging / "receipts" / name).exists():
                self.fetch(f"receipts/{name}")

    def size(self, name: str) -> int | None:
        """Return the size of a file at the URL in bytes, or None if it does not exist."""
        self._filesystem.invalidate_cache()
        with self._told(name):
            try:
                return int(self._asked(name, lambda: self._filesystem.info(f"{self._root}/{name}"))["size"])
            except FileNotFoundError:
                return None

    def send(self, name: str) -> None:
        """Upload a file from the staging directory.

        Object stores show a file only once it is complete.

        Raises:
            CacheError: the file cannot be sent, or its size at the URL differs.
        """
        local = self.staging / name
        with self._told(name):
            make_parent(self._filesystem, f"{self._root}/{name}")
            self._asked(name, lambda: self._filesystem.put_file(str(local), f"{self._root}/{name}"), timeout=_SENDING)
        found = self.size(name)
        if found != local.stat().st_size:
            raise CacheError(
                f"{self.url}/{name}: expected {local.stat().st_size:,} bytes after sending, found {found}; run the same command again"
            )

    def is_same(self, name: str) -> bool:
        """Whether a file at the URL equals the local one."""
        path = f"{self._root}/{name}"
        with self._told(name):
            try:
                found = self._asked(name, lambda: bytes(self._filesystem.cat_file(path)))
            except FileNotFoundError:
                return False
        return found == (self.staging / name).read_bytes()

    def sizes(self, directory: str) -> dict[str, int]:
        """Return name -> bytes of the files in a directory at the URL."""
        self._filesystem.invalidate_cache()
        with self._told(directory):
            try:
                found = self._asked(directory, lambda: self._filesystem.ls(f"{self._root}/{directory}", detail=True))
            except FileNotFoundError:
                return {}
        return {str(item["name"]).rpartition("/")[2]: int(item["size"]) for item in found if item["type"] == "file"}

    def is_empty(self) -> bool:
        """Whether the URL holds no files."""
        return not self.names("")

    def clear(self, names: tuple[str, ...]) -> None:
        """Delete files and directories at the URL, in the given order."""
        for name in names:
            with self._told(name):
                path = f"{self._root}/{name}"
                if self._filesystem.exists(path):
                    self._filesystem.rm(path, recursive=True)
        self._filesystem.invalidate_cache()

    def _asked(self, name: str, request: Callable[[], Result], *, timeout: float | None = None) -> Result:
        return patiently(f"{self.url}/{name}", request, timeout=timeout)

    def names(self, directory: str) -> list[str]:
        """Return the names of the entries in a directory at the URL."""
        self._filesystem.invalidate_cache()
        with self._told(directory):
            try:
                found = self._filesystem.ls(f"{self._root}/{directory}".rstrip("/"), detail=False)
            except FileNotFoundError:
                return []
        return sorted(Path(path).name for path in found)

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Convert errors of the file system to a one-line `CacheError` without credentials."""
        try:
            yield
        except FileNotFoundError as error:
            raise CacheError(f"{self.url}/{name}: cannot be reached: {reason(error)}; does the bucket exist?") from None
        except Exception as error:  # each file system has its own exceptions
            if isinstance(error, CacheError):
                raise
            raise CacheError(
                f"{self.url}/{name}: {reason(error)}; uploaded files are kept: run the same command again"
            ) from None
