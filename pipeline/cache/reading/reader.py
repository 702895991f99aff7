"""Open a cache, and read its rows back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch.utils.data import Dataset

from pipeline.cache.format.codec import unpack
from pipeline.cache.format.contents import check_contents
from pipeline.cache.format.manifest import Layout, load_manifest, strangers
from pipeline.cache.format.schema import soft_columns
from pipeline.cache.format.tokenizer_files import load_cached_tokenizer
from pipeline.cache.reading.remote import Remote, RemoteShard, open_remote
from pipeline.cache.reading.shards import check_beside, check_footer, check_shard_file, open_shard, read_row_group
from pipeline.cache.reading.verification import verify
from pipeline.cache.storage.store import DEFAULT_BYTES
from pipeline.cache.storage.urls import is_url
from pipeline.errors import CacheError, IntegrityError
from pipeline.records import CachedExample, Manifest, Shard, SoftLabels

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Cache:
    """A finished cache. `root` and `manifest` say which; everything else is read when it is asked for."""

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
            verify: `quick` checks the manifest, and that each shard is there, of its size and its columns (behind a URL: the columns when it is first
                read); `full` reads every byte.
            cache_dir: where what is fetched is kept. Default: `softlabel` in the user's cache directory.
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
        columns = {name: pa.array([list(row[name])], type=kind) for name, kind in types.items()}
        others = {"source_row": 0, "piece": 0, "content_hash": 0, "teacher_nll_sum": 0.0, "teacher_entropy_sum": 0.0}
        columns.update({name: pa.array([value]) for name, value in others.items()})
        columns["input_ids"] = pa.array([[]], type=pa.list_(pa.int32()))
        table = pa.table(columns)
        return unpack(table, contract.encoding, contract.num_classes)[0].soft

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


class CacheDataset(Dataset[CachedExample]):
    """Rows of one split, or of several, by number. A row group is decoded once, and dropped when as many rows were read as it has.

    Memory is bounded by `window` row groups, not by the cache. Picklable: each DataLoader worker opens its own files.
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
        self._decoded: OrderedDict[int, list[CachedExample]] = OrderedDict()
        self._left: dict[int, int] = {}
        """Rows of each decoded row group that were not read yet."""
        self.upcoming: Sequence[int] = ()
        """Row groups that are read next. Behind a URL they are fetched ahead, from when the first of them is decoded: what is only skipped is not."""
        self._announced: set[int] = set()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> CachedExample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = self.group_of(index)
        row = self._rows(group)[index - int(self.starts[group])]
        self._left[group] -= 1
        if not self._left[group]:
            del self._decoded[group]
        return row

    def __iter__(self) -> Iterator[CachedExample]:
        for group in range(len(self.groups)):
            self.upcoming = range(group, min(group + 3, len(self.groups)))
            yield from (self[row] for row in range(int(self.starts[group]), int(self.starts[group + 1])))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoded": OrderedDict(), "_left": {}}

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
        """(rows,) int64: the length of each row of the whole split. Reads the token ids, a row group at a time."""
        lengths = (pc.list_value_length(table.column(0)) for table in self.tables(["input_ids"]))
        parts = [length.to_numpy().astype(np.int64) for length in lengths]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def _rows(self, group: int) -> list[CachedExample]:
        if group not in self._decoded:
            while len(self._decoded) >= self.window:
                self._decoded.popitem(last=False)
            self._announce()
            contract = self.manifest.contract
            table = self._read(group)
            self._announced.discard(group)
            name, i = self.groups[group]
            shard = Layout(self.root).shard(name) if self.remote is None else self.remote.shard(name)
            check_contents(table, contract, f"{shard}: row group {i}")
            self._decoded[group] = unpack(table, contract.encoding, contract.num_classes)
            self._left[group] = table.num_rows
        self._decoded.move_to_end(group)
        return self._decoded[group]

    def _announce(self) -> None:
        if self.remote is None:
            return
        for group in self.upcoming:
            if group not in self._announced and group not in self._decoded:
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
