"""Publish to S3-compatible stores and other URLs that fsspec opens.

Shards are sent first, the manifest last, by a conditional put.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fsspec.callbacks import Callback

from pipeline.cache.reading.remote import list_files
from pipeline.cache.storage.transfer import TIMEOUT, create_file, is_local, make_parent, patiently
from pipeline.cache.storage.urls import open_filesystem
from pipeline.errors import CacheError, ContractError
from pipeline.progress import Progress
from pipeline.sharing.contents import Contents
from pipeline.sources.files.loading import reason, redact

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Item = TypeVar("Item")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

#: Marker file with the cache_id of an unfinished push. A push of the same cache resumes; a push of
#: another cache fails.
_MARK = ".push.json"
#: Number of parallel uploads.
_PARALLEL = 4
#: Minimum speed of an upload in bytes per second, for its time-out.
_SLOWEST = 100_000


def push_to_store(contents: Contents, url: str) -> int:
    """Send the files that are missing in the store.

    A shard with the right size from an earlier push of the same cache is complete, since stores do
    not show partially written objects.

    Returns:
        The number of bytes of the shards that were sent.

    Raises:
        ContractError: another cache is there, or is being pushed there.
        CacheError: the store cannot be written.
    """
    url = url.rstrip("/")
    store = _Store(url)
    text = contents.manifest.read_bytes()
    there = store.cache_id("manifest.json")
    if there is None and not store.create(_MARK, json.dumps({"cache_id": contents.cache_id}).encode()):
        there_too = store.cache_id(_MARK)
        if there_too != contents.cache_id:
            raise store.taken(there_too)
    missing = store.missing(contents, there)
    if len(missing) < len(contents.shards):
        logger.info("%s: %d of %d shards are there", store, len(contents.shards) - len(missing), len(contents.shards))
    store.put_all(missing, "push")
    store.put_all(contents.others)
    if not store.create("manifest.json", text):
        there = store.cache_id("manifest.json")
        if there != contents.cache_id:
            raise ContractError(
                f"{store}: another writer has finished a cache there (cache_id {str(there)[:12]}...); use another URL"
            )
    store.remove(_MARK)
    return sum(path.stat().st_size for path in missing.values())


def missing_in_store(contents: Contents, url: str) -> dict[str, Path]:
    """The shards that a push would send; writes nothing.

    Raises:
        ContractError: another cache is there, or is being pushed there.
        CacheError: other shards are there, or the store cannot be read.
    """
    store = _Store(url.rstrip("/"))
    there = store.cache_id("manifest.json")
    begun = store.cache_id(_MARK) if there is None else None
    if begun not in (None, contents.cache_id):
        raise store.taken(begun)
    return store.missing(contents, there)


class _Sent(Callback):  # type: ignore[misc]
    """Progress of one upload, from the callbacks of the store's client."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress
        self._bytes = 0

    def relative_update(self, inc: int = 1) -> None:
        """Report `inc` more bytes."""
        self.reach(self._bytes + inc)

    def absolute_update(self, value: int) -> None:
        """Report the total number of bytes sent."""
        self.reach(value)

    def reach(self, count: int) -> None:
        """Set the number of bytes sent; a retry may lower it."""
        self._progress.update(count - self._bytes)
        self._bytes = count


class _Store:
    """A directory behind a URL."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._filesystem, self._path = open_filesystem(url)
        self._filesystem.invalidate_cache()

    def __str__(self) -> str:
        return redact(self._url)

    def put_all(self, files: dict[str, Path], what: str | None = None) -> None:
        """Send files in parallel; `what` labels the progress bar, None shows none."""
        total = sum(path.stat().st_size for path in files.values())
        with Progress(what or "", total, unit="B", shown=what is not None) as progress:

            def send(item: tuple[str, Path]) -> None:
                name, path = item
                self._put(name, path, _Sent(progress))

            in_parallel(send, list(files.items()), _PARALLEL)

    def cache_id(self, name: str) -> str | None:
        """The cache_id in a JSON file; None if the file does not exist."""
        try:
            content = json.loads(self._try(name, lambda fs, path: fs.cat_file(path)))
        except FileNotFoundError:
            return None
        except ValueError:
            raise CacheError(
                f"{self}/{name}: is not JSON, so that the content of the directory is unknown; use another URL"
            ) from None
        return str(content.get("cache_id")) if isinstance(content, dict) else ""

    def taken(self, cache_id: str | None) -> ContractError:
        """The error that another cache is being pushed."""
        return ContractError(
            f"{self}: another cache is being pushed there (cache_id {str(cache_id)[:12]}...); use another URL, or remove {_MARK} if no push is running"
        )

    def missing(self, contents: Contents, there: str | None) -> dict[str, Path]:
        """The shards that the store does not have with the right size.

        Args:
            there: the cache_id of the manifest in the store; None: no manifest.

        Raises:
            ContractError: `there` is another cache's.
            CacheError: the store holds shards of another cache.
        """
        if there not in (None, contents.cache_id):
            raise ContractError(
                f"{self}: holds another cache (cache_id {str(there)[:12]}..., not {contents.cache_id[:12]}...); use another URL"
            )
        sizes = list_files(self._url, "data")
        names = {name.rpartition("/")[2] for name in contents.shards}
        extra = sorted(name for name in sizes if name not in names and name.endswith(".parquet"))
        if extra:
            raise CacheError(f"{self}/data/{extra[0]}: is no part of this cache; use another URL")
        return {
            name: path
            for name, path in contents.shards.items()
            if sizes.get(name.rpartition("/")[2]) != path.stat().st_size
        }

    def create(self, name: str, data: bytes) -> bool:
        """Create a file if it does not exist, by a conditional put if the store supports it.

        Returns:
            Whether the file was created.
        """
        return self._write(name, lambda filesystem, path: create_file(filesystem, path, data))

    def remove(self, name: str) -> None:
        """Delete a file if it exists."""
        try:
            self._try(name, lambda fs, path: fs.rm_file(path))
        except FileNotFoundError:
            return

    def _put(self, name: str, local: Path, sent: _Sent) -> None:
        size = local.stat().st_size

        def request(filesystem: AbstractFileSystem, path: str) -> None:
            sent.reach(0)  # restart the progress of a retry
            make_parent(filesystem, path)
            if is_local(filesystem):  # its put is not atomic
                filesystem.put_file(str(local), f"{path}.part", callback=sent)
                os.replace(f"{path}.part", path)
            else:
                filesystem.put_file(str(local), path, callback=sent)

        self._write(name, request, timeout=max(TIMEOUT, size / _SLOWEST))
        sent.reach(size)

    def _write(
        self, name: str, request: Callable[[AbstractFileSystem, str], Result], timeout: float | None = None
    ) -> Result:
        try:
            return self._try(name, request, timeout)
        except FileNotFoundError as error:  # for example, the bucket does not exist
            raise CacheError(f"{self}/{name}: cannot be written: {reason(error)}") from None

    def _try(
        self, name: str, request: Callable[[AbstractFileSystem, str], Result], timeout: float | None = None
    ) -> Result:
        path = f"{self._path}/{name}"
        return patiently(f"{self}/{name}", lambda: request(self._filesystem, path), timeout=timeout)


def in_parallel(work: Callable[[Item], None], items: list[Item], threads: int) -> None:
    """Call `work` for every item in threads; the first error cancels the rest and is raised."""
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
