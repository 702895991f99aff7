"""Read a cache behind a URL on demand, one row group at a time, through a bounded local store.

A small shard is fetched whole, and its SHA-256 is checked at once. Of a larger shard the footer is
fetched, then each row group by one request. Page checksums are verified on decoding, and the
SHA-256 of the file once all of it is fetched. Damaged pieces of the store are fetched again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import queue
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.cache.format.manifest import NAME, load_manifest
from pipeline.cache.format.tokenizer_files import tokenizer_problems
from pipeline.cache.storage.store import DEFAULT_BYTES, Store, default_directory
from pipeline.cache.storage.transfer import patiently, read_range
from pipeline.cache.storage.urls import open_filesystem, pinned
from pipeline.errors import CacheError, IntegrityError
from pipeline.records import Manifest, Shard
from pipeline.sources.files.loading import redact

#: Up to this size in bytes, a shard is fetched by one request.
_SMALL = 1 << 20
#: Bytes at the end of a shard that are fetched first: PyArrow reads as many to find the footer.
_TAIL = 1 << 16
#: Number of threads that prefetch row groups.
_FETCHERS = 4


class Remote:
    """The location of a cache's shards, and the pieces of them that were fetched."""

    _fetchers: list[threading.Thread]

    def __init__(self, url: str, manifest: Manifest, store: Store) -> None:
        self.url = url.rstrip("/")
        """The URL with its credentials, if it has any; never shown. Messages use `str()`."""
        self.shards = {shard.name: shard for shard in manifest.shards}
        self.store = store
        self.prefix = manifest.cache_id[:32]
        self._begin()

    def __str__(self) -> str:
        return redact(self.url)

    def shard(self, name: str) -> RemoteShard:
        """Return a shard as a file that PyArrow can open."""
        return RemoteShard(self, self.shards[name])

    def announce(self, name: str, group: int) -> None:
        """Start to prefetch a row group; a failure is raised when the row group is read."""
        self._check_process()
        if not self._fetchers:
            self._fetchers = [
                threading.Thread(target=self._fetch_ahead, name="fetch", daemon=True) for _ in range(_FETCHERS)
            ]
            for thread in self._fetchers:
                thread.start()
        self._queue.put((name, group))

    def piece(self, shard: Shard, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of a shard, from the store or the network.

        Raises:
            CacheError: the network failed repeatedly.
            IntegrityError: the shard is missing or too short, or a whole shard has another SHA-256.
        """
        self._check_process()
        name = self._name(shard, start, stop)
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:  # wait for a prefetch of the same piece
            data = self.store.read(name)
            if data is None or len(data) != stop - start:
                data = self._fetch(shard, start, stop)
                self.store.write(name, data)
            return data

    def holds(self, shard: Shard, start: int, stop: int) -> bool:
        """Whether a piece is in the store."""
        return self.store.holds(self._name(shard, start, stop))

    def is_checked(self, shard: Shard) -> bool:
        """Whether the SHA-256 of the whole shard was verified."""
        return self.store.holds(f"{self.prefix}/pieces/{shard.name}/checked")

    def mark_checked(self, shard: Shard) -> None:
        """Record that the SHA-256 of the whole shard was verified."""
        self.store.write(f"{self.prefix}/pieces/{shard.name}/checked", b"")

    def forget(self, shard: Shard) -> None:
        """Delete the stored pieces of a shard."""
        shutil.rmtree(self.store.directory / self.prefix / "pieces" / shard.name, ignore_errors=True)

    def _fetch(self, shard: Shard, start: int, stop: int) -> bytes:
        where = f"{self}/data/{shard.name}.parquet"

        def request() -> bytes:
            filesystem, path = open_filesystem(self.url)
            return read_range(filesystem, f"{path}/data/{shard.name}.parquet", start, stop)

        try:
            data = patiently(where, request)
        except FileNotFoundError:
            raise IntegrityError(f"{where}: expected a shard that manifest.json lists, found no such file") from None
        if (start, stop) == (0, shard.bytes):
            check_sha256(where, shard, hashlib.sha256(data).hexdigest())
        return data

    def _fetch_ahead(self) -> None:
        while True:
            name, group = self._queue.get()
            try:
                shard = self.shard(name)
                shard.load(pq.ParquetFile(shard).metadata, group)
            except Exception:  # the reader will raise it too
                continue

    def _name(self, shard: Shard, start: int, stop: int) -> str:
        return f"{self.prefix}/pieces/{shard.name}/{start}-{stop}"

    def _begin(self) -> None:
        self._process = os.getpid()
        self._guard = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._queue: queue.Queue[tuple[str, int]] = queue.Queue()
        self._fetchers = []

    def _check_process(self) -> None:
        if self._process != os.getpid():  # a forked worker has no threads, and locks may be held
            self.store = Store(self.store.directory, self.store.max_bytes)
            self._begin()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


class RemoteShard(io.RawIOBase):
    """A shard as a file object for PyArrow, built from fetched pieces; `str()` is its URL."""

    def __init__(self, remote: Remote, shard: Shard) -> None:
        super().__init__()
        self.remote = remote
        self.record = shard
        self._position = 0
        self._pieces: dict[int, bytes] = {}
        size = shard.bytes
        self._take(0 if size <= _SMALL else size - _TAIL, size)

    def __str__(self) -> str:
        return f"{self.remote}/data/{self.record.name}.parquet"

    def load(self, metadata: pq.FileMetaData, group: int, columns: Sequence[str] | None = None) -> None:
        """Fetch a row group by one request, or the given columns of it."""
        if self.record.bytes <= _SMALL:
            return
        if columns is not None:
            for start, stop in _column_ranges(metadata, group, columns):
                self._take(start, stop)
            return
        self._take(*_group_range(metadata, group))

    def check_whole(self, metadata: pq.FileMetaData) -> None:
        """Verify the file's SHA-256 once, when the store has all row groups.

        Raises:
            IntegrityError: it differs from the manifest.
        """
        ranges = [_group_range(metadata, group) for group in range(metadata.num_row_groups)]
        bounds = [4, *(stop for _, stop in ranges)]
        if (
            self.record.bytes <= _SMALL  # verified when it was fetched
            or self.remote.is_checked(self.record)
            or [start for start, _ in ranges] != bounds[:-1]  # gaps: from another writer
            or not all(self.remote.holds(self.record, *piece) for piece in ranges)
        ):
            return
        found = self._digest(ranges)
        if found != self.record.sha256:  # damaged in the store or in transfer: fetch it again
            self._forget()
            found = self._digest(ranges)
        if found != self.record.sha256:
            self._forget()
        check_sha256(str(self), self.record, found)
        self.remote.mark_checked(self.record)

    def _digest(self, ranges: Sequence[tuple[int, int]]) -> str:
        digest = hashlib.sha256(b"PAR1")
        for start, stop in ranges:
            digest.update(self.remote.piece(self.record, start, stop))
        self.seek(ranges[-1][1])
        digest.update(self.read())
        return digest.hexdigest()

    def _forget(self) -> None:
        self._pieces.clear()
        self.remote.forget(self.record)

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position of the next read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position of the next read, and return it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.record.bytes}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, from a fetched piece or from the network."""
        start = self._position
        stop = self.record.bytes if size < 0 else min(start + size, self.record.bytes)
        if stop <= start:
            return b""
        self._position = stop
        for first, piece in self._pieces.items():
            if first <= start and stop <= first + len(piece):
                return piece[start - first : stop - first]
        return self._take(start, stop)

    def _take(self, start: int, stop: int) -> bytes:
        data = self._pieces[start] = self.remote.piece(self.record, start, stop)
        return data


def open_remote(url: str, cache_dir: Path | None = None, cache_bytes: int = DEFAULT_BYTES) -> tuple[Path, Remote]:
    """Return a directory with a cache's manifest and tokenizer, and the location of its shards.

    Args:
        cache_dir: directory for fetched files. Default: `softlabel` in the user's cache directory.
        cache_bytes: most bytes of shards to keep there.

    Raises:
        CacheError: there is no finished cache, or it cannot be reached.
        IntegrityError: the manifest, the tokenizer or the size of a shard is wrong.
    """
    directory = cache_dir or default_directory()
    url = pinned(url)
    draft = directory / f"opening-{os.getpid()}-{threading.get_ident()}"
    try:
        draft.mkdir(parents=True, exist_ok=True)
        manifest = fetch_manifest(url, draft)
        mirror = directory / manifest.cache_id[:32]
        mirror.mkdir(exist_ok=True)
        if not (mirror / "tokenizer").is_dir():
            fetch_tokenizer(url, draft, manifest)
            if not (mirror / "tokenizer").is_dir():
                os.replace(draft / "tokenizer", mirror / "tokenizer")
        os.replace(draft / "manifest.json", mirror / "manifest.json")
    except OSError as error:
        raise CacheError(
            f"{directory}: cannot be written ({error.strerror or error}); name another --cache-dir"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    check_sizes(url, manifest)
    return mirror, Remote(url, manifest, Store(directory, cache_bytes))


def check_sha256(where: str, shard: Shard, found: str) -> None:
    """Compare the SHA-256 of a shard's bytes with the manifest.

    Raises:
        IntegrityError: they differ.
    """
    if found != shard.sha256:
        raise IntegrityError(
            f"{where}: sha256 differs from manifest.json (expected {shard.sha256[:12]}..., found {found[:12]}...); push the cache there again"
        )


def list_files(url: str, folder: str) -> dict[str, int]:
    """Return name -> size of the files in a folder of a cache; empty if there is no folder."""
    filesystem, path = open_filesystem(url)
    try:
        found = patiently(
            f"{redact(url)}/{folder}", lambda: filesystem.ls(f"{path}/{folder}", detail=True, refresh=True)
        )
    except FileNotFoundError:
        return {}
    files = {str(item["name"]).rpartition("/")[2]: item for item in found if item["type"] == "file"}
    return {name: int(item["size"]) for name, item in files.items() if NAME.fullmatch(name)}


def read_small(url: str, name: str) -> bytes:
    """Return the contents of a small file of a cache.

    Raises:
        FileNotFoundError: there is no such file.
        CacheError: it cannot be read.
    """
    filesystem, path = open_filesystem(url)
    return patiently(f"{redact(url)}/{name}", lambda: bytes(filesystem.cat_file(f"{path}/{name}")))


def fetch_manifest(url: str, folder: Path) -> Manifest:
    """Download a cache's manifest into a folder, and load it.

    Raises:
        CacheError: there is no finished cache.
        IntegrityError: the manifest is damaged or not valid.
    """
    _fetch_small(url, "manifest.json", folder)
    with _named(url, folder):
        return load_manifest(folder)


def fetch_tokenizer(url: str, folder: Path, manifest: Manifest) -> None:
    """Download the tokenizer's files into a folder, and compare them with the manifest.

    Raises:
        IntegrityError: they differ from the manifest's tokenizer.
    """
    for name in list_files(url, "tokenizer"):
        _fetch_small(url, f"tokenizer/{name}", folder)
    with _named(url, folder):
        problems = tokenizer_problems(folder / "tokenizer", manifest.contract)
        if problems:
            raise IntegrityError(problems[0])


def _fetch_small(url: str, name: str, folder: Path) -> None:
    try:
        data = read_small(url, name)
    except FileNotFoundError:
        raise CacheError(f"{redact(url)}: no cache here ({name} is missing)") from None
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@contextlib.contextmanager
def _named(url: str, folder: Path) -> Iterator[None]:
    """Replace the folder by the URL in error messages."""
    try:
        yield
    except CacheError as error:
        raise type(error)(str(error).replace(str(folder), redact(url))) from None


def check_sizes(url: str, manifest: Manifest) -> None:
    """Check by one listing that all shards exist with their sizes, and that there are no others.

    Raises:
        IntegrityError: names the first that differs.
    """
    found = list_files(url, "data")
    shown = f"{redact(url).rstrip('/')}/data"
    for shard in manifest.shards:
        size = found.pop(f"{shard.name}.parquet", None)
        if size != shard.bytes:
            there = "no such file" if size is None else f"{size} bytes"
            raise IntegrityError(
                f"{shown}/{shard.name}.parquet: expected {shard.bytes} bytes, as manifest.json says, found {there}; push the cache there again"
            )
    extra = sorted(name for name in found if name.endswith(".parquet"))
    if extra:
        raise IntegrityError(f"{shown}/{extra[0]}: is not in manifest.json; move it out of the cache")


def _chunk_range(column: Any) -> tuple[int, int]:
    start = column.data_page_offset
    if column.dictionary_page_offset is not None:
        start = min(start, column.dictionary_page_offset)
    return start, start + column.total_compressed_size


def _group_range(metadata: pq.FileMetaData, group: int) -> tuple[int, int]:
    """Return the byte range [start, stop) of a row group, whose columns are contiguous."""
    row_group = metadata.row_group(group)
    ranges = [_chunk_range(row_group.column(i)) for i in range(row_group.num_columns)]
    return min(start for start, _ in ranges), max(stop for _, stop in ranges)


def _column_ranges(metadata: pq.FileMetaData, group: int, columns: Sequence[str]) -> list[tuple[int, int]]:
    row_group = metadata.row_group(group)
    chunks = [row_group.column(i) for i in range(row_group.num_columns)]
    return [_chunk_range(chunk) for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
