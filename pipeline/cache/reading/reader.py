"""Open a cache and read its rows."""

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
    """A finished cache of soft labels.

    `root` and `manifest` identify it; everything else is read on demand.
    """

    root: Path
    """The cache's directory; for a cache behind a URL, a local directory with its manifest and
    tokenizer."""
    manifest: Manifest
    remote: Remote | None = None
    """The location of the shards of a cache behind a URL; None: they are in `root`."""

    @classmethod
    def open(
        cls,
        url: str | Path,
        *,
        verify: Literal["quick", "full", "none"] = "quick",
        cache_dir: str | Path | None = None,
        cache_bytes: int = DEFAULT_BYTES,
    ) -> Cache:
        """Open a cache in a directory, or behind any URL that fsspec opens.

        The shards of a cache behind a URL are fetched as they are read.

        Args:
            url: directory or URL.
            verify: `quick` checks the manifest, and that each shard exists with the expected size
                and columns (behind a URL, columns are checked when a shard is first read). `full`
                also reads every byte, which needs a cache in a directory. `none` checks the
                manifest only.
            cache_dir: directory for fetched files. Default: `softlabel` in the user's cache
                directory.
            cache_bytes: most bytes of fetched shards to keep there.

        Raises:
            CacheError: there is no finished cache, or `full` was given with a URL.
            IntegrityError: the cache differs from its manifest.
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
        """The cache's directory, or its URL without credentials."""
        return str(self.root if self.remote is None else self.remote)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return self.manifest.splits

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that made the token ids, or the image processor of a cache of images."""
        return load_cached_tokenizer(self.root / "tokenizer")

    @property
    def as_captured(self) -> Cache:
        """The cache in the teacher's tokens, if this one is read in a student's; else itself."""
        return self

    @property
    def vocabulary_map(self) -> VocabularyMap | None:
        """The map from the teacher's classes to those of a student with another tokenizer.

        None: the classes are the same.
        """
        return None

    @property
    def location(self) -> str:
        """The directory, or the URL with its credentials, for opening it again; never shown."""
        return str(self.root) if self.remote is None else self.remote.url

    def directory(self, what: str) -> Path:
        """Return the directory of the cache, for operations that read all shards.

        Args:
            what: the operation, for the message.

        Raises:
            CacheError: the cache is behind a URL.
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
            CacheError: the cache is behind a URL.
        """
        if self.remote is not None:
            raise CacheError(
                f"{self.where}: a cache behind a URL cannot be verified in place; fetch and verify it: softlabel pull --from {self.where} --output DIR"
            )
        verify(self.root).raise_first()

    def dataset(self, split: str | Sequence[str], *, window: int = 8) -> CacheDataset:
        """Return the rows of one or more splits as a dataset for `torch.utils.data.DataLoader`.

        Args:
            split: name of a split, or names of several, which are concatenated.
            window: number of decoded row groups to keep in memory.

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
        """Return the soft labels of one row that another library has read.

        Args:
            row: column name -> list or array, with the columns of this cache.
        """
        contract = self.manifest.contract
        types = soft_columns(contract.encoding, contract.num_classes)
        columns = pa.table({name: pa.array([list(row[name])], type=kind) for name, kind in types.items()})
        return unpack_soft(unpack(columns, contract.encoding, contract.num_classes))

    def check_files(self) -> None:
        """Check without reading the data that all shards, and no others, are there.

        Sizes, row counts and columns are compared with the manifest.

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
    """A decoded row group."""

    block: RowBlock
    left: int
    """Number of rows that were not read yet."""
    rows: list[CachedExample] | None = None
    """Created when a single row is first requested."""


class CacheDataset(Dataset[CachedExample]):
    """Rows of one or more splits, read one by one or as blocks of columns.

    `segments` and `blocks` read many rows at once. A row group is read once, and dropped when as
    many rows were read as it has, so memory is bounded by `window` row groups, not by the cache.
    Picklable: each DataLoader worker opens its own files.
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
        """Number of row groups in memory: as many as the order of reading draws from."""
        self.groups = [(shard.name, i) for shard in shards for i in range(len(shard.row_groups))]
        self.starts = np.cumsum([0, *(rows for shard in shards for rows in shard.row_groups)])
        """(groups + 1,): the first row of each row group."""
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self.upcoming: Sequence[int] = ()
        """Row groups that are read next. Behind a URL they are prefetched once the first of them is
        decoded, so row groups that are only skipped are not fetched."""
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
        """Return rows by number, as runs of consecutive rows within a row group."""
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
        """Yield all rows in order, as blocks.

        Args:
            rows: rows of each block. None: one row group.
            names: the columns to keep. None: all.
        """
        cuts = self.starts if rows is None else np.append(np.arange(0, len(self), rows), len(self))
        for start, stop in itertools.pairwise(cuts.tolist()):
            group = self.group_of(start)
            self.upcoming = range(group, min(group + 3, len(self.groups)))
            yield gather(self.segments(np.arange(start, stop)), names=names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def group_of(self, index: int) -> int:
        """Return the number of the row group that has a row."""
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield some columns of all rows, in the given order, one row group at a time."""
        for group in range(len(self.groups)):
            yield self._read(group, columns).select(columns)

    def column(self, name: str) -> np.ndarray:
        """Return one plain column of all rows, (rows,); reads no other column."""
        parts = [table.column(0).to_numpy() for table in self.tables([name])]
        return np.concatenate(parts) if parts else np.zeros(0)

    def num_tokens(self) -> np.ndarray:
        """Return the number of tokens of each row, (rows,) int64; 1 for an image.

        Reads the token ids, one row group at a time.
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
        """Return the rows of a row group as a block."""
        contract = self.manifest.contract
        return unpack(table, contract.encoding, contract.num_classes)

    def _read_rows(self, group: int, opened: _Open, rows: int) -> None:
        """Count rows as read, and drop a row group when all of its rows were read."""
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
        """Read a row group from its file, or from behind a URL."""
        name, i = self.groups[group]
        if self.remote is None:
            path = Layout(self.root).shard(name)
            return read_row_group(open_shard(path), path, i, columns=columns)
        try:
            table, shard, file = self._fetch(self.remote, name, i, columns)
        except IntegrityError:  # damaged in the store or in transfer: fetch it again
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
