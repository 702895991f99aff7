"""Bound the memory that decoding a Parquet file takes, before anything is decoded.

A few kilobytes of Parquet can claim to decode to gigabytes. The totals in the footer may be wrong,
so they are no bound. The decoder uses the header of each page: its sizes bound the decompressed
bytes, and its count of values bounds the decoded values. Page headers are in Thrift's compact
protocol (https://parquet.apache.org/docs/file-format/), which pyarrow does not expose.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import IntegrityError

#: Limit for one decoded row group. The writer's row groups have 16 MB, or one row; the largest row
#: that a capture makes has 64 MB.
MOST_BYTES = 256 << 20
_MOST_FOOTER = 16 << 20
_MOST_PAGES = 10_000
_HEADER_WINDOW = 1 << 16
#: Bytes of one value in memory, without its two levels (`_LEVELS`). Byte strings are bounded by the
#: decompressed size instead.
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "FLOAT": 4, "DOUBLE": 8}
_LEVELS = 4


#: A shard: a path, or a file-like object for a shard behind a URL.
ShardFile = Path | io.RawIOBase


def _opened(path: ShardFile) -> contextlib.AbstractContextManager[BinaryIO]:
    return path.open("rb") if isinstance(path, Path) else contextlib.nullcontext(cast(BinaryIO, path))


def read_footer(path: ShardFile) -> bytes:
    """Return the footer of a Parquet file, which no page checksum covers.

    Raises:
        IntegrityError: there is no footer, or it is larger than any that a capture writes.
    """
    with _opened(path) as handle:
        size = handle.seek(0, 2)
        handle.seek(max(size - 8, 0))
        tail = handle.read(8)
        if size < 12 or tail[4:] != b"PAR1":
            raise IntegrityError(f"{path}: is not a Parquet file: PAR1 is missing at its end")
        (length,) = struct.unpack("<I", tail[:4])
        if length > min(size - 12, _MOST_FOOTER):
            raise IntegrityError(
                f"{path}: footer: expected at most {min(size - 12, _MOST_FOOTER)} bytes, found {length}"
            )
        handle.seek(size - 8 - length)
        return handle.read(length)


def check_types(file: pq.ParquetFile, path: ShardFile) -> None:
    """Refuse physical types, nesting and Arrow types that no cache has.

    Raises:
        IntegrityError: names the column.
    """
    if b"ARROW:schema" in (file.metadata.metadata or {}):
        raise IntegrityError(
            f"{path}: has an Arrow schema in its metadata, which no cache has; it may name extension types"
        )
    for i in range(len(file.schema)):
        column = file.schema.column(i)
        known = column.physical_type in _WIDTHS or column.physical_type == "BYTE_ARRAY" or _is_half(column)
        if not known or column.max_repetition_level > 1 or column.max_definition_level > 3:
            raise IntegrityError(
                f"{path}: column {column.path}: expected a number, a text or a list of numbers, found {column.physical_type}, nested {column.max_repetition_level} deep"
            )


def check_row_group(file: pq.ParquetFile, path: ShardFile, group: int, columns: Sequence[str] | None = None) -> None:
    """Refuse a row group that would decode to more than `MOST_BYTES`.

    Args:
        columns: the columns to be read. Default: all.

    Raises:
        IntegrityError: names the file, the row group and the column.
    """
    total = 0
    metadata = file.metadata.row_group(group)
    with _opened(path) as handle:
        for i in range(metadata.num_columns):
            chunk = metadata.column(i)
            if columns is not None and chunk.path_in_schema.partition(".")[0] not in columns:
                continue
            where = f"{path}: row group {group}: column {chunk.path_in_schema}"
            pages = _read_pages(handle, chunk, where)
            if pages.values != chunk.num_values:
                raise IntegrityError(
                    f"{where}: values differ between pages and footer (expected {chunk.num_values}, found {pages.values})"
                )
            total += _decoded_bytes(pages, file.schema.column(i), path, group, where)
            if total > MOST_BYTES:
                raise IntegrityError(
                    f"{where}: this column and those before it would take more than {MOST_BYTES >> 20} MB of memory"
                )


@dataclass(frozen=True, slots=True)
class _Pages:
    """Totals over the pages of one column chunk."""

    values: int
    bytes: int
    """Decompressed bytes of all pages."""
    dictionary_bytes: int


def _read_pages(handle: BinaryIO, chunk: Any, where: str) -> _Pages:
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < (chunk.dictionary_page_offset or 0) < start:
        start = chunk.dictionary_page_offset
    end = start + chunk.total_compressed_size
    if start < 4 or chunk.total_compressed_size < 0 or end > handle.seek(0, 2):
        raise IntegrityError(f"{where}: its bytes lie outside of the file")
    values = decompressed = dictionary = 0
    for _ in range(_MOST_PAGES):
        if start >= end:
            return _Pages(values, decompressed, dictionary)
        handle.seek(start)
        header = _Header(handle.read(min(_HEADER_WINDOW, end - start)), where)
        fields = header.read_struct()
        size, compressed = fields.get(2), fields.get(3)
        if not isinstance(size, int) or not isinstance(compressed, int) or size < 0 or compressed < 0:
            raise IntegrityError(f"{where}: page header: expected sizes, found {size!r} and {compressed!r}")
        decompressed += size
        data = fields.get(5) or fields.get(8)
        if isinstance(data, dict):
            count = data.get(1)
            if not isinstance(count, int) or count < 0:
                raise IntegrityError(f"{where}: page header: expected a count of values, found {count!r}")
            values += count
        elif fields.get(7) is not None:
            dictionary += size
        start += header.position + compressed
    raise IntegrityError(f"{where}: expected at most {_MOST_PAGES} pages")


def _decoded_bytes(pages: _Pages, column: Any, path: ShardFile, group: int, where: str) -> int:
    if column.physical_type != "BYTE_ARRAY":
        width = int(_WIDTHS.get(column.physical_type, column.length))
        return max(pages.bytes, pages.values * (width + _LEVELS))
    if pages.values * pages.dictionary_bytes <= MOST_BYTES:
        return pages.bytes + pages.values * (pages.dictionary_bytes + _LEVELS)
    if pages.bytes > MOST_BYTES:
        return pages.bytes
    # A dictionary entry may be repeated many times: sum the lengths by index, without expanding
    # them.
    try:
        coded = (
            pq.ParquetFile(path, read_dictionary=[column.path]).read_row_group(group, columns=[column.path]).column(0)
        )
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(f"{where}: is damaged: {str(error).splitlines()[0][:200]}") from None
    total = pages.bytes
    for part in coded.chunks:
        lengths = pa.compute.binary_length(part.dictionary)
        total += pa.compute.sum(lengths.take(part.indices)).as_py() or 0
    return int(total)


def _is_half(column: Any) -> bool:
    return bool(column.physical_type == "FIXED_LEN_BYTE_ARRAY" and column.length == 2)


class _Header:
    """Parser for one struct of Thrift's compact protocol.

    Integers and structs are returned by field number; other fields are skipped.
    """

    def __init__(self, data: bytes, where: str) -> None:
        self._data = data
        self._where = where
        self.position = 0

    def read_struct(self, depth: int = 0) -> dict[int, Any]:
        """Read the fields up to the end of the struct."""
        if depth > 4:
            raise self._damaged()
        found: dict[int, Any] = {}
        number = 0
        while kind := self._byte():
            number = number + (kind >> 4) if kind >> 4 else self._zigzag()
            found[number] = self._value(kind & 15, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # true, false
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._zigzag()
        if kind == 7:
            return self._skip(8)
        if kind == 8:
            return self._skip(self._varint())
        if kind == 12:
            return self.read_struct(depth + 1)
        raise self._damaged()

    def _byte(self) -> int:
        if self.position >= len(self._data):
            raise self._damaged()
        self.position += 1
        return self._data[self.position - 1]

    def _varint(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise self._damaged()

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, count: int) -> None:
        if count > len(self._data) - self.position:
            raise self._damaged()
        self.position += count

    def _damaged(self) -> IntegrityError:
        return IntegrityError(f"{self._where}: a page header is damaged")
