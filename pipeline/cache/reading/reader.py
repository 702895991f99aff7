"""Open a cache, and read its rows back."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch.utils.data import Dataset

from pipeline.cache.format.codec import unpack, unpack_soft
from pipeline.cache.format.contents import check_contents
from pipeline.cache.format.manifest import Layout, load_manifest, strangers
from pipeline.cache.format.rows import gather, rows_of
from pipeline.cache.format.schema import soft_columns
from pipeline.cache.format.tokenizer_files import load_cached_tokenizer
from pipeline.cache.reading.remote import Remote, RemoteShard, open_remote
from pipeline.cache.reading.shards import check_beside, check_footer, check_shard_file, open_shard, read_row_group
from pipeline.cache.reading.verification import verify
from pipeline.cache.storage.store import DEFAULT_BYTES
from pipeline.cache.storage.urls import is_url
from pipeline.errors import CacheError, IntegrityError
from pipeline.records import CachedExample, Manifest, RowBlock, Segment, Shard, SoftLabels, VocabularyMap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Cache:
    """A finished cache.

    `root` and `manifest` say which; everything else is read when it is asked for.
    """

    root: Path
    """Of a cache behind a URL: a directory with its manifest and tokenizer."""
    manifest: Manifest
    remote: Remote | None = None
    """Where the shards of a cache behind a URL are."""

    @classmethod
    def open(
        cls,
        url: str | Path,
        *,
        verify: Literal["quick", "full", "none"] = "quick",
        cache_dir: str | Path | None = None,
        cache_bytes: int = DEFAULT_BYTES,
    ) -> Cache:
        """Open a cache directory, or a cache behind any URL that fsspec opens: its shards are fetched as they are read.

        Args:
            verify: `quick` checks the manifest, and that each shard is there, of its size and its
                columns (behind a URL: the columns when it is first read); `full` reads every byte.
            cache_dir: where what is fetched is kept. Default: `softlabel` in the user's cache
                directory.
            cache_bytes: of fetched shards that are kept there, at most.

        Raises:
            CacheError: no finished cache there.
            IntegrityError: it is not what its manifest says.
        """
        if is_url(str(url)):
            root, remote = open_remote(str(url), None if cache_dir is None else Path(cache_dir), cache_bytes)
            found = cls(root, load_manifest(root), remote)
            if verify == "full":
                found.verify()
            return found
        cache = cls(Path(url), load_manifest(Path(url)))
        if verify != "none":
            cache.check_files()
        if verify == "full":
            cache.verify()
        return cache

    @property
    def where(self) -> str:
        """Its directory, or its URL without credentials."""
        return str(self.root if self.remote is None else self.remote)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return self.manifest.splits

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that made the token ids."""
        return load_cached_tokenizer(self.root / "tokenizer")

    @property
    def as_captured(self) -> Cache:
        """The cache in the teacher's own tokens, where this one is read in a student's."""
        return self

    @property
    def vocabulary_map(self) -> VocabularyMap | None:
        """What makes the teacher's classes those of a student with another tokenizer; None: they are the same."""
        return None

    @property
    def location(self) -> str:
        """What opens it again: the directory, or the URL with its credentials, which is never shown."""
        return str(self.root) if self.remote is None else self.remote.url

    def directory(self, what: str) -> Path:
        """The directory that its shards are in, for what reads all of them.

        Raises:
            CacheError: it is behind a URL.
        """
        if self.remote is not None:
            raise CacheError(
                f"{self.where}: {what} needs the cache in a directory; fetch it first: softlabel pull --from {self.where} --output DIR"
            )
        return self.root

    def verify(self) -> None:
        """Read every byte and compare it with the manifest.

        Raises:
            IntegrityError: names the first file (and row group) that differs.
            CacheError: it is behind a URL.
        """
        if self.remote is not None:
            raise CacheError(
                f"{self.where}: every byte of a cache behind a URL is verified by fetching it: softlabel pull --from {self.where} --output DIR"
            )
        verify(self.root).raise_first()

    def dataset(self, split: str | Sequence[str], *, window: int = 8) -> CacheDataset:
        """The rows of a split, or of several one after another, for `torch.utils.data.DataLoader`.

        Args:
            window: row groups that are held decoded at once.

        Raises:
            CacheError: there is no such split.
        """
        shards: tuple[Shard, ...] = ()
        for name in (split,) if isinstance(split, str) else split:
            found = self.manifest.split_shards(name)
            if not found:
                raise CacheError(f"{self.where}: no split {name!r}; the cache has {', '.join(self.splits) or 'none'}")
            shards += found
        return CacheDataset(self.root, self.manifest, shards, window=window, remote=self.remote)

    def soft_labels(self, row: Mapping[str, Any]) -> SoftLabels:
        """The soft labels of one row as another reader gives it: a mapping of this cache's columns (lists or arrays)."""
        contract = self.manifest.contract
        types = soft_columns(contract.encoding, contract.num_classes)
        columns = pa.table({name: pa.array([list(row[name])], type=kind) for name, kind in types.items()})
        return unpack_soft(unpack(columns, contract.encoding, contract.num_classes))

    def check_files(self) -> None:
        """What can be checked without reading the data: shards present, their sizes, rows and columns; no others there.

        Raises:
            IntegrityError: names the file.
        """
        layout = Layout(self.root)
        check_beside(self.root)
        for shard in self.manifest.shards:
            check_shard_file(layout.shard(shard.name), shard, self.manifest)
        extra = strangers(layout, self.manifest)
        if extra:
            raise IntegrityError(f"{extra[0]}: is not in manifest.json; move it out of the cache")


@dataclass(slots=True)
class _Open:
    """A row group that was read."""

    block: RowBlock
    left: int
    """Rows that were not read yet."""
    rows: list[CachedExample] | None = None
    """Made when one of them is asked for by itself."""


class CacheDataset(Dataset[CachedExample]):
    """Rows of one split, or of several, by number: one by one, or many at once by column (`segments`, `blocks`).

    A row group is read once, and dropped when as many rows were read as it has. Memory is bounded
    by `window` row groups, not by the cache. Picklable: each DataLoader worker opens its own files.
    """

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        shards: tuple[Shard, ...],
        *,
        window: int = 8,
        remote: Remote | None = None,
    ) -> None:
        self.root = root
        self.manifest = manifest
        self.remote = remote
        self.window = window
        """Row groups held at once: as many as the order of reading draws from."""
        self.groups = [(shard.name, i) for shard in shards for i in range(len(shard.row_groups))]
        self.starts = np.cumsum([0, *(rows for shard in shards for rows in shard.row_groups)])
        """(groups + 1,): the first row of each row group."""
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self.upcoming: Sequence[int] = ()
        """Row groups that are read next. Behind a URL they are fetched ahead, from when the first
        of them is decoded: what is only skipped is not."""
        self._announced: set[int] = set()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> CachedExample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = self.group_of(index)
        found = self._group(group)
        if found.rows is None:
            found.rows = rows_of(found.block)
        row = found.rows[index - int(self.starts[group])]
        self._read_rows(group, found, 1)
        return row

    def __iter__(self) -> Iterator[CachedExample]:
        for group in range(len(self.groups)):
            self.upcoming = range(group, min(group + 3, len(self.groups)))
            yield from (self[row] for row in range(int(self.starts[group]), int(self.starts[group + 1])))

    def segments(self, rows: np.ndarray) -> list[Segment]:
        """Rows by number, as runs of rows that stand one after another in a row group."""
        groups = np.searchsorted(self.starts, rows, side="right") - 1
        follows = (rows[1:] == rows[:-1] + 1) & (groups[1:] == groups[:-1])
        firsts = np.flatnonzero(np.append(True, ~follows))
        groups = groups[firsts]
        counts = np.append(firsts[1:], len(rows)) - firsts
        places = rows[firsts] - self.starts[groups]
        found = []
        for group, place, count in zip(groups.tolist(), places.tolist(), counts.tolist(), strict=True):
            opened = self._group(group)
            found.append((opened.block, place, place + count))
            self._read_rows(group, opened, count)
        return found

    def blocks(self, rows: int | None = None, *, names: Container[str] | None = None) -> Iterator[RowBlock]:
        """All rows in order, so many at a time (None: a row group at a time), and the columns of these names (None: all)."""
        cuts = self.starts if rows is None else np.append(np.arange(0, len(self), rows), len(self))
        for start, stop in itertools.pairwise(cuts.tolist()):
            group = self.group_of(start)
            self.upcoming = range(group, min(group + 3, len(self.groups)))
            yield gather(self.segments(np.arange(start, stop)), names=names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def group_of(self, index: int) -> int:
        """Which row group a row is in."""
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Some columns of the whole split, in the order given, a row group at a time."""
        for group in range(len(self.groups)):
            yield self._read(group, columns).select(columns)

    def column(self, name: str) -> np.ndarray:
        """One plain column of the whole split, (rows,). Reads that column alone."""
        parts = [table.column(0).to_numpy() for table in self.tables([name])]
        return np.concatenate(parts) if parts else np.zeros(0)

    def num_tokens(self) -> np.ndarray:
        """(rows,) int64: the length of each row of the whole split, 1 of an image.

        Reads the token ids, a row group at a time.
        """
        if "input_ids" not in self.manifest.contract.columns:
            return np.ones(len(self), dtype=np.int64)
        lengths = (pc.list_value_length(table.column(0)) for table in self.tables(["input_ids"]))
        parts = [length.to_numpy().astype(np.int64) for length in lengths]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def _group(self, group: int) -> _Open:
        found = self._open.get(group)
        if found is None:
            while len(self._open) >= self.window:
                self._open.popitem(last=False)
            self._announce()
            contract = self.manifest.contract
            table = self._read(group)
            self._announced.discard(group)
            name, i = self.groups[group]
            shard = Layout(self.root).shard(name) if self.remote is None else self.remote.shard(name)
            check_contents(table, contract, f"{shard}: row group {i}")
            found = _Open(self._block(group, table), table.num_rows)
            self._open[group] = found
        else:
            self._open.move_to_end(group)
        return found

    def _block(self, group: int, table: pa.Table) -> RowBlock:
        """The rows of a row group by column."""
        contract = self.manifest.contract
        return unpack(table, contract.encoding, contract.num_classes)

    def _read_rows(self, group: int, opened: _Open, rows: int) -> None:
        """Count rows as read; a row group whose rows were all read is dropped."""
        opened.left -= rows
        if opened.left <= 0:
            del self._open[group]

    def _announce(self) -> None:
        if self.remote is None:
            return
        for group in self.upcoming:
            if group not in self._announced and group not in self._open:
                self._announced.add(group)
                self.remote.announce(*self.groups[group])

    def _read(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        """A row group, from its file or from behind a URL."""
        name, i = self.groups[group]
        if self.remote is None:
            path = Layout(self.root).shard(name)
            return read_row_group(open_shard(path), path, i, columns=columns)
        try:
            table, shard, file = self._fetch(self.remote, name, i, columns)
        except IntegrityError:  # damaged in the store, or on the way: once more, from the network
            self.remote.forget(self.remote.shards[name])
            table, shard, file = self._fetch(self.remote, name, i, columns)
        shard.check_whole(file.metadata)
        return table

    def _fetch(
        self, remote: Remote, name: str, group: int, columns: Sequence[str] | None
    ) -> tuple[pa.Table, RemoteShard, pq.ParquetFile]:
        shard = remote.shard(name)
        file = open_shard(shard)
        check_footer(file, shard, shard.record, self.manifest)
        return read_row_group(file, shard, group, columns=columns), shard, file
