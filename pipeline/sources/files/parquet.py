"""Read Parquet files in place by row group, local or behind a URL.

Nothing is converted. Of a remote file, only the footer and the needed row groups are fetched, by
range requests for the columns that are read.
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

#: Number of bytes at the end of a file that are read first; a longer footer takes a second request.
_TAIL_BYTES = 64 << 10
_NO_RANGES = "the server does not serve ranges of bytes; download the file and give its path"
#: Number of footers that are fetched at the same time.
_THREADS = 8


@dataclass(frozen=True, slots=True)
class State:
    """The metadata by which a changed file is detected without reading it."""

    size: int
    """Size in bytes."""
    tag: str
    """ETag or blob id from the remote store; empty for a local file."""
    changed: int = 0
    """Modification time of a local file, in nanoseconds."""


@dataclass(frozen=True, slots=True)
class Footer:
    """The metadata of one Parquet file, known without reading its rows."""

    location: str
    """A local path, or a URL."""
    metadata: pq.FileMetaData
    schema: pa.Schema
    sha256: str
    """Hash of the footer, which holds the offset and statistics of every column chunk."""
    state: State
    """The file's state when the footer was read."""

    @property
    def identity(self) -> tuple[int, int, str, str]:
        """Number of rows, bytes, footer hash and tag; files that agree in these count as equal."""
        return self.metadata.num_rows, self.state.size, self.sha256, self.state.tag


class ParquetRows:
    """The rows of several Parquet files, in order.

    Only columns that every file has can be read. Other files are cast to the types of the first.
    """

    def __init__(
        self, files: Sequence[Footer], features: Features | None = None, rows: np.ndarray | None = None
    ) -> None:
        """Combine files, and select some or all of their rows.

        Args:
            features: column types to use instead of those of the first file.
            rows: (n,) int64, ascending: the selected rows; None: all.
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
        """The columns that every file has."""
        return list(self.features)

    @property
    def absent(self) -> dict[str, str]:
        """The columns that only some files have, each with the location of a file that lacks it."""
        names = dict.fromkeys(name for file in self._files for name in file.schema.names)
        lacking = {name: [file.location for file in self._files if name not in file.schema.names] for name in names}
        return {name: files[0] for name, files in lacking.items() if files}

    def split_by(self, *columns: str) -> list[tuple[str, ParquetRows]]:
        """Divide the files into runs of consecutive files that have the same ones of these columns.

        Returns:
            The location of the first file of each run, and its rows.
        """
        runs = itertools.groupby(self._files, key=lambda file: [name in file.schema.names for name in columns])
        members = [tuple(files) for _, files in runs]
        return [(files[0].location, ParquetRows(files, self._given)) for files in members]

    @property
    def starts(self) -> np.ndarray:
        """(row groups,) the first row of each row group; empty if only some rows are selected."""
        return np.zeros(0, dtype=np.int64) if self._rows is not None else self._starts[:-1]

    def select(self, rows: np.ndarray) -> ParquetRows:
        """Select rows, given as (n,) int64 in ascending order."""
        chosen = rows if self._rows is None else self._rows[rows]
        return ParquetRows(self._files, self.features, chosen)

    def with_feature(self, column: str, feature: Any) -> ParquetRows:
        """Decode a column as another feature with the same storage type."""
        import datasets

        return ParquetRows(self._files, datasets.Features({**self.features, column: feature}), self._rows)

    def few_groups(self, start: int, stop: int, most: int) -> list[range]:
        """Return the rows of `[start, stop)` in at most `most` evenly spaced row groups."""
        pieces = self._pieces(start, stop)
        chosen = np.unique(np.linspace(0, len(pieces) - 1, num=min(most, len(pieces))).astype(np.int64))
        return [pieces[i][1] for i in chosen.tolist()]

    def identity(self, start: int, stop: int) -> list[object]:
        """Identify the rows `[start, stop)` by their files and their positions in the files."""
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
        """Yield the rows `[start, stop)` in order, one row group at a time.

        Args:
            names: columns to read.

        Raises:
            SourceError: a file has changed or cannot be read any more, or a column cannot be cast
                to the first file's type.
        """
        for group, piece in self._pieces(start, stop):
            table = self._read(group, tuple(names))
            before = int(self._starts[group])
            if self._rows is None:
                yield _dataset(table.slice(piece.start - before, len(piece)), self.features)
            else:
                yield _dataset(table.take(pa.array(self._rows[piece.start : piece.stop] - before)), self.features)

    def _pieces(self, start: int, stop: int) -> list[tuple[int, range]]:
        """Divide the rows `[start, stop)` by row group, into (row group, rows)."""
        starts = self._starts if self._rows is None else np.searchsorted(self._rows, self._starts)
        first, last = np.searchsorted(starts, [start, stop - 1], side="right") - 1 if start < stop else (0, -1)
        edges = starts.tolist()
        pieces = ((g, range(max(start, edges[g]), min(stop, edges[g + 1]))) for g in range(first, last + 1))
        return [(group, rows) for group, rows in pieces if len(rows)]

    def _group_of(self, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.searchsorted(self._starts, rows, side="right") - 1
        return found

    def _read(self, group: int, names: tuple[str, ...]) -> pa.Table:
        """Read columns of a row group; the latest is cached, since several shards may share it."""
        import datasets
        from datasets.table import table_cast

        latest = self._latest
        if latest is not None and latest[0] == (group, names):
            return latest[1]
        self._latest = None  # free the old row group before the next is read
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
        except Exception as error:  # file systems and Arrow's casts raise different exceptions
            raise SourceError(
                f"{redact(file.location)}: row group {inside} cannot be read: {reason(error)}; repair the file, or leave it out"
            ) from error
        self._latest = (group, names), table
        return table

    def _reader(self, number: int) -> pq.ParquetFile:
        """Return the reader of a file; it stays open until another file is read."""
        if self._open is None or self._open[0] != number:
            if self._open is not None:
                self._open[1].close()
            file = self._files[number]
            handle = _opened(file.location)
            self._open = number, handle, pq.ParquetFile(handle, metadata=file.metadata, pre_buffer=True)
        return self._open[2]


def parquet_rows(locations: Sequence[str], features: Features | None = None) -> ParquetRows:
    """Open the Parquet files of one split: read their footers, several at a time.

    Args:
        locations: local paths or URLs, in order.
        features: column types to use instead of those of the first file.

    Raises:
        SourceError: a file cannot be opened, or is no Parquet file.
    """
    with ThreadPoolExecutor(min(_THREADS, len(locations))) as pool:
        return ParquetRows(list(pool.map(_read_footer, locations)), features)


def of_stream(dataset: IterableDataset) -> ParquetRows | None:
    """Return the Parquet files of a data set that was loaded with `streaming=True`.

    Returns:
        None if the data set is of other files, or has a filter, selected columns or a transform.
    """
    from datasets.iterable_dataset import ArrowExamplesIterable
    from datasets.packaged_modules.parquet.parquet import Parquet

    plain = dataset._ex_iterable  # `datasets` has no public access to the files
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
    except Exception as error:  # file systems raise different exceptions
        raise SourceError(
            f"{redact(location)}: cannot be opened: {reason(error)}; check the path and your access to it"
        ) from error
    try:
        reader = pq.ParquetFile(io.BytesIO(tail))
        return Footer(location, reader.metadata, reader.schema_arrow, hashlib.sha256(tail[-length:]).hexdigest(), state)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"{redact(location)}: cannot be read as parquet: {reason(error)}; repair the file, or convert it"
        ) from error


def _last_bytes(handle: Any, size: int, count: int) -> bytes:
    handle.seek(max(0, size - count))
    found: bytes = handle.read(min(size, count))
    return found


def _opened(location: str) -> Any:
    """Open a file as a seekable handle without read-ahead."""
    if "://" not in location:
        return pa.memory_map(location)
    filesystem, path = filesystem_of(location)
    handle = filesystem.open(path, "rb", cache_type="none")
    if not handle.seekable():
        raise OSError(_NO_RANGES)
    return handle


def filesystem_of(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a URL, and the path in it. Credentials come from the environment.

    Raises:
        SourceError: the scheme has no file system, or its package is missing.
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
    """Wrap a table as a `datasets.Dataset`, which decodes it."""
    import datasets

    kept = datasets.Features({name: features[name] for name in table.column_names})
    return datasets.Dataset(
        datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=kept), fingerprint="in-place"
    )
