"""Parquet files read in place, local or behind a URL: planned from their footers, read by row group.

Nothing is converted, and of a remote file only the footer and the row groups that are asked for are
fetched, each by ranged requests for the columns that are read.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SourceError
from pipeline.sources.files.loading import reason, redact

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset
    from fsspec import AbstractFileSystem

#: Bytes at the end of a file that are read first: a longer footer takes a second request.
_TAIL_BYTES = 64 << 10
_NO_RANGES = "the server does not serve ranges of bytes; download the file and give its path"
#: Footers that are fetched at the same time.
_THREADS = 8


@dataclass(frozen=True, slots=True)
class State:
    """What tells whether a file has changed, without reading it."""

    size: int
    """Bytes."""
    tag: str
    """ETag or blob, as the store has it; empty for a local file."""
    changed: int = 0
    """Of a local file: when, in nanoseconds."""


@dataclass(frozen=True, slots=True)
class Footer:
    """What is known of one Parquet file without reading its rows."""

    location: str
    """A local path, or a URL."""
    metadata: pq.FileMetaData
    schema: pa.Schema
    sha256: str
    """Of the footer, which holds the place and the statistics of every column chunk."""
    state: State
    """When the footer was read."""

    @property
    def identity(self) -> tuple[int, int, str, str]:
        """Rows, bytes, footer and tag: two files that agree in these are taken for equal."""
        return self.metadata.num_rows, self.state.size, self.sha256, self.state.tag


class ParquetRows:
    """The rows of several Parquet files, one file after another.

    Columns that some file lacks cannot be used. Types are those of the first file, to which the
    others are cast.
    """

    def __init__(
        self, files: Sequence[Footer], features: Features | None = None, rows: np.ndarray | None = None
    ) -> None:
        """Rows of all files, or some of them.

        Args:
            features: instead of what the first file says.
            rows: (n,) int64, ascending: the rows that count; None: all.
        """
        import datasets

        self._files = tuple(files)
        self._given = features
        found = features or datasets.Features.from_arrow_schema(files[0].schema)
        common = set.intersection(*(set(file.schema.names) for file in files))
        self.features: Any = datasets.Features({name: kind for name, kind in found.items() if name in common})
        self._rows = rows
        self._groups = [(i, j) for i, file in enumerate(files) for j in range(file.metadata.num_row_groups)]
        counts = [files[i].metadata.row_group(j).num_rows for i, j in self._groups]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._latest: tuple[object, pa.Table] | None = None
        self._open: tuple[int, Any, pq.ParquetFile] | None = None

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._rows is None else len(self._rows)

    @property
    def column_names(self) -> list[str]:
        """Columns that every file has."""
        return list(self.features)

    @property
    def absent(self) -> dict[str, str]:
        """Column -> a file that lacks it, of the columns that only some files have."""
        names = dict.fromkeys(name for file in self._files for name in file.schema.names)
        lacking = {name: [file.location for file in self._files if name not in file.schema.names] for name in names}
        return {name: files[0] for name, files in lacking.items() if files}

    def split_by(self, *columns: str) -> list[tuple[str, ParquetRows]]:
        """Runs of files that have the same ones of these columns, in order: each with the location of its first file."""
        runs = itertools.groupby(self._files, key=lambda file: [name in file.schema.names for name in columns])
        members = [tuple(files) for _, files in runs]
        return [(files[0].location, ParquetRows(files, self._given)) for files in members]

    @property
    def starts(self) -> np.ndarray:
        """(row groups,) the first row of each; empty where only some rows count."""
        return np.zeros(0, dtype=np.int64) if self._rows is not None else self._starts[:-1]

    def select(self, rows: np.ndarray) -> ParquetRows:
        """The same files with these of their rows, (n,) int64 in ascending order."""
        chosen = rows if self._rows is None else self._rows[rows]
        return ParquetRows(self._files, self.features, chosen)

    def with_feature(self, column: str, feature: Any) -> ParquetRows:
        """The same rows, of which a column is decoded as another feature of the same storage."""
        import datasets

        return ParquetRows(self._files, datasets.Features({**self.features, column: feature}), self._rows)

    def few_groups(self, start: int, stop: int, most: int) -> list[range]:
        """The rows `[start, stop)` that lie in at most so many row groups, evenly spaced."""
        pieces = self._pieces(start, stop)
        chosen = np.unique(np.linspace(0, len(pieces) - 1, num=min(most, len(pieces))).astype(np.int64))
        return [pieces[i][1] for i in chosen.tolist()]

    def identity(self, start: int, stop: int) -> list[object]:
        """What the rows `[start, stop)` are known by: the files that hold them, and where in them they lie."""
        if start >= stop:
            return []
        rows = np.array([start, stop - 1]) if self._rows is None else self._rows[[start, stop - 1]]
        first, last = (self._groups[group][0] for group in self._group_of(rows).tolist())
        before = sum(file.metadata.num_rows for file in self._files[:first])
        picked: list[object] = []
        if self._rows is not None:
            inside = np.ascontiguousarray(self._rows[start:stop] - before, dtype="<i8")
            picked = [hashlib.sha256(inside.tobytes()).hexdigest()]
        files = [list(file.identity) for file in self._files[first : last + 1]]
        return [int(rows[0]) - before, stop - start, *picked, files]

    def parts(self, names: Sequence[str], start: int, stop: int) -> Iterator[Dataset]:
        """The rows `[start, stop)` in order, those of one row group at a time.

        Raises:
            SourceError: a file that cannot be read any more, or a column that cannot be cast to the
                first file's type.
        """
        for group, piece in self._pieces(start, stop):
            table = self._read(group, tuple(names))
            before = int(self._starts[group])
            if self._rows is None:
                yield _dataset(table.slice(piece.start - before, len(piece)), self.features)
            else:
                yield _dataset(table.take(pa.array(self._rows[piece.start : piece.stop] - before)), self.features)

    def _pieces(self, start: int, stop: int) -> list[tuple[int, range]]:
        """The rows `[start, stop)`, cut where a row group ends: (row group, rows) each."""
        starts = self._starts if self._rows is None else np.searchsorted(self._rows, self._starts)
        first, last = np.searchsorted(starts, [start, stop - 1], side="right") - 1 if start < stop else (0, -1)
        edges = starts.tolist()
        pieces = ((g, range(max(start, edges[g]), min(stop, edges[g + 1]))) for g in range(first, last + 1))
        return [(group, rows) for group, rows in pieces if len(rows)]

    def _group_of(self, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.searchsorted(self._starts, rows, side="right") - 1
        return found

    def _read(self, group: int, names: tuple[str, ...]) -> pa.Table:
        """The columns of a row group; the latest one is kept, since several shards may lie in it."""
        import datasets
        from datasets.table import table_cast

        latest = self._latest
        if latest is not None and latest[0] == (group, names):
            return latest[1]
        self._latest = None  # two are never in memory
        number, inside = self._groups[group]
        file = self._files[number]
        wanted = datasets.Features({name: self.features[name] for name in names}).arrow_schema
        try:
            if _state(file.location) != file.state:
                raise SourceError(
                    f"{redact(file.location)}: the file has changed since its footer was read; run the same command again"
                )
            table = self._reader(number).read_row_group(inside, columns=list(names)).select(list(names))
            table = table_cast(table, wanted)
        except SourceError:
            raise
        except Exception as error:  # each file system has errors of its own, and so have Arrow's casts
            raise SourceError(
                f"{redact(file.location)}: row group {inside} cannot be read: {reason(error)}; mend the file, or leave it out"
            ) from error
        self._latest = (group, names), table
        return table

    def _reader(self, number: int) -> pq.ParquetFile:
        """Of one file; it stays open until another is read."""
        if self._open is None or self._open[0] != number:
            if self._open is not None:
                self._open[1].close()
            file = self._files[number]
            handle = _opened(file.location)
            self._open = number, handle, pq.ParquetFile(handle, metadata=file.metadata, pre_buffer=True)
        return self._open[2]


def parquet_rows(locations: Sequence[str], features: Features | None = None) -> ParquetRows:
    """Read the footers of the files of one split, several at a time.

    Args:
        locations: local paths or URLs, in order.

    Raises:
        SourceError: one cannot be opened, or is no Parquet file.
    """
    with ThreadPoolExecutor(min(_THREADS, len(locations))) as pool:
        return ParquetRows(list(pool.map(_read_footer, locations)), features)


def of_stream(dataset: IterableDataset) -> ParquetRows | None:
    """The Parquet files behind a data set that was loaded with `streaming=True`; None where it is anything else."""
    from datasets.iterable_dataset import ArrowExamplesIterable
    from datasets.packaged_modules.parquet.parquet import Parquet

    plain = dataset._ex_iterable  # `datasets` has no public way to the files
    builder: Any = getattr(getattr(plain, "generate_tables_fn", None), "__self__", None)
    if type(plain) is not ArrowExamplesIterable or not isinstance(builder, Parquet):
        return None
    config, groups = builder.config, plain.kwargs.get("row_groups_list") or []
    if config.filters is not None or config.columns is not None or any(group is not None for group in groups):
        return None
    return parquet_rows([str(file) for file in plain.kwargs["files"]], dataset.features)


def _read_footer(location: str) -> Footer:
    try:
        state = _state(location)
        size = state.size
        if not size:
            raise SourceError(f"{redact(location)}: no rows; expected at least one")
        with _opened(location) as handle:
            tail = _last_bytes(handle, size, _TAIL_BYTES)
            length = int.from_bytes(tail[-8:-4], "little") + 8
            if tail[-4:] == b"PAR1" and length > len(tail):
                tail = _last_bytes(handle, size, length)
    except SourceError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise SourceError(
            f"{redact(location)}: cannot be opened: {reason(error)}; check the path and your access to it"
        ) from error
    try:
        reader = pq.ParquetFile(io.BytesIO(tail))
        return Footer(location, reader.metadata, reader.schema_arrow, hashlib.sha256(tail[-length:]).hexdigest(), state)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"{redact(location)}: cannot be read as parquet: {reason(error)}; mend the file, or convert it"
        ) from error


def _last_bytes(handle: Any, size: int, count: int) -> bytes:
    handle.seek(max(0, size - count))
    found: bytes = handle.read(min(size, count))
    return found


def _opened(location: str) -> Any:
    """A seekable handle that reads what it is asked for and nothing ahead."""
    if "://" not in location:
        return pa.memory_map(location)
    filesystem, path = filesystem_of(location)
    handle = filesystem.open(path, "rb", cache_type="none")
    if not handle.seekable():
        raise OSError(_NO_RANGES)
    return handle


def filesystem_of(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path in it. Credentials are those of the environment.

    Raises:
        SourceError: no file system of this scheme, or its package is missing.
    """
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise SourceError(f"{redact(url)}: cannot be opened: {reason(error)}") from None
    return filesystem, str(path)


def _state(location: str) -> State:
    if "://" not in location:
        found = os.stat(location)
        return State(found.st_size, "", found.st_mtime_ns)
    filesystem, path = filesystem_of(location)
    details = filesystem.info(path)
    if details["size"] is None or not details.get("partial", True):
        raise OSError(_NO_RANGES)
    large = details.get("lfs") or {}
    tag = details.get("ETag") or details.get("etag") or getattr(large, "sha256", None) or details.get("blob_id") or ""
    return State(int(details["size"]), str(tag).strip('"'))


def _dataset(table: pa.Table, features: Features) -> Dataset:
    """A table as `datasets` decodes it."""
    import datasets

    kept = datasets.Features({name: features[name] for name in table.column_names})
    return datasets.Dataset(
        datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=kept), fingerprint="in-place"
    )
