"""A cache that is made behind a URL: each shard is made in a local directory, sent whole, and forgotten here.

What is there already is known from the receipts there, so that any number of machines may work on
one cache, and a killed one loses what it had not sent.
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

#: Seconds that a whole shard may take.
_SENDING = 3600.0

Result = TypeVar("Result")


class Outbox:
    """Sends the files of one cache to a URL.

    Credentials are the environment's, as the file system of the URL reads them.
    """

    def __init__(self, url: str) -> None:
        self.url = redact(url)
        """As messages show it."""
        self.location = url
        """With its credentials, if it has any: never shown."""
        self._filesystem, self._root = open_filesystem(url)
        self.staging = Path(tempfile.mkdtemp(prefix="softlabel-"))
        """The local directory; it goes with this object, at the latest with the process."""
        weakref.finalize(self, shutil.rmtree, self.staging, ignore_errors=True)

    def create(self, name: str, text: str) -> bool:
        """Create a file whole, unless it is there: a conditional put, so that of two racing writers one gets True.

        File systems that know no conditional put look first and write then.
        """
        path = f"{self._root}/{name}"
        with self._told(name):
            if self._filesystem.exists(path):
                return False
            return create_file(self._filesystem, path, text.encode())

    def fetch(self, name: str) -> bool:
        """Copy a file from there to its place here. False: there is none."""
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
        """All receipts that are not here yet: what other workers have made."""
        for name in self.names("receipts"):
            if not (self.staging / "receipts" / name).exists():
                self.fetch(f"receipts/{name}")

    def size(self, name: str) -> int | None:
        """Bytes of a file there; None: there is none."""
        self._filesystem.invalidate_cache()
        with self._told(name):
            try:
                return int(self._asked(name, lambda: self._filesystem.info(f"{self._root}/{name}"))["size"])
            except FileNotFoundError:
                return None

    def send(self, name: str) -> None:
        """Copy a file from here to there: object stores show it whole or not at all.

        Raises:
            CacheError: it cannot be sent, or is of another size there.
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
        """Whether a file there is the one here."""
        path = f"{self._root}/{name}"
        with self._told(name):
            try:
                found = self._asked(name, lambda: bytes(self._filesystem.cat_file(path)))
            except FileNotFoundError:
                return False
        return found == (self.staging / name).read_bytes()

    def sizes(self, directory: str) -> dict[str, int]:
        """Name -> bytes of the files in a directory there."""
        self._filesystem.invalidate_cache()
        with self._told(directory):
            try:
                found = self._asked(directory, lambda: self._filesystem.ls(f"{self._root}/{directory}", detail=True))
            except FileNotFoundError:
                return {}
        return {str(item["name"]).rpartition("/")[2]: int(item["size"]) for item in found if item["type"] == "file"}

    def is_empty(self) -> bool:
        """Whether nothing is there."""
        return not self.names("")

    def clear(self, names: tuple[str, ...]) -> None:
        """Delete these files and directories there, in this order."""
        for name in names:
            with self._told(name):
                path = f"{self._root}/{name}"
                if self._filesystem.exists(path):
                    self._filesystem.rm(path, recursive=True)
        self._filesystem.invalidate_cache()

    def _asked(self, name: str, request: Callable[[], Result], *, timeout: float | None = None) -> Result:
        return patiently(f"{self.url}/{name}", request, timeout=timeout)

    def names(self, directory: str) -> list[str]:
        """Names of what is in a directory there."""
        self._filesystem.invalidate_cache()
        with self._told(directory):
            try:
                found = self._filesystem.ls(f"{self._root}/{directory}".rstrip("/"), detail=False)
            except FileNotFoundError:
                return []
        return sorted(Path(path).name for path in found)

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """What goes wrong over there, as one line without credentials."""
        try:
            yield
        except FileNotFoundError as error:
            raise CacheError(f"{self.url}/{name}: cannot be reached: {reason(error)}; is the bucket there?") from None
        except Exception as error:  # each file system has errors of its own
            if isinstance(error, CacheError):
                raise
            raise CacheError(
                f"{self.url}/{name}: {reason(error)}; what was sent is kept: run the same command again"
            ) from None
