"""Checks on opening a shard: place, size, footer, columns, and page checksums of what is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.format.hashes import footer_sha256
from pipeline.cache.format.pages import check_row_group, check_types, read_footer
from pipeline.cache.format.schema import describe
from pipeline.cache.reading.remote import RemoteShard
from pipeline.errors import IntegrityError
from pipeline.records import Manifest, Shard

#: Exceptions that PyArrow raises for damaged files. A flipped bit in a column's name gives
#: UnicodeDecodeError.
_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)

_COPY = "copy the cache's files themselves (cp -rL)"

#: Suffixes of pickles and of code.
_PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz", ".py", ".pyc", ".so")

#: Limits for a footer: bytes of a string, items of a list, and depth of the schema.
_MOST_THRIFT_STRING, _MOST_THRIFT_ITEMS, _MOST_DEPTH = 16 << 20, 100_000, 8

REMEDY = 'run the same "softlabel cache-logits" to make it again, or fetch a copy again'


def check_shard_file(path: Path, shard: Shard, manifest: Manifest) -> pq.ParquetFile:
    """Check that a shard exists with the expected size, row groups and columns; reads no data.

    Raises:
        IntegrityError: says what differs from the manifest.
    """
    if path.is_symlink() or path.parent.is_symlink():
        raise IntegrityError(f"{path}: is a symbolic link, which may point anywhere; {_COPY}")
    if not path.is_file():
        raise IntegrityError(f"{path}: expected a shard that manifest.json lists, found no such file; {REMEDY}")
    size = path.stat().st_size
    if size != shard.bytes:
        raise IntegrityError(
            f"{path}: size differs from manifest.json (expected {shard.bytes} bytes, found {size}); {REMEDY}"
        )
    file = open_shard(path)
    check_footer(file, path, shard, manifest)
    return file


def check_footer(file: pq.ParquetFile, path: Path | RemoteShard, shard: Shard, manifest: Manifest) -> None:
    """Check the row groups and columns of an open shard.

    Raises:
        IntegrityError: says what differs from the manifest.
    """
    if footer_sha256(path) != shard.footer_sha256:
        raise IntegrityError(f"{path}: footer differs from manifest.json; {REMEDY}")
    check_types(file, path)
    groups = tuple(file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups))
    if groups != shard.row_groups:
        raise IntegrityError(
            f"{path}: row groups differ from manifest.json (expected {shard.row_groups}, found {groups}); {REMEDY}"
        )
    found = describe(file.schema_arrow)
    expected = dict(manifest.contract.columns)
    if found != expected:
        name = next(n for n in [*expected, *found] if expected.get(n) != found.get(n))
        raise IntegrityError(
            f"{path}: column {name} differs from manifest.json (expected {expected.get(name)}, found {found.get(name)}); {REMEDY}"
        )


def open_shard(path: Path | RemoteShard) -> pq.ParquetFile:
    """Open a Parquet file with page checksums verified and extension types off.

    The size of the footer is bounded.

    Raises:
        IntegrityError: it is not a Parquet file.
    """
    read_footer(path)
    try:
        return pq.ParquetFile(
            path,
            page_checksum_verification=True,
            arrow_extensions_enabled=False,
            thrift_string_size_limit=_MOST_THRIFT_STRING,
            thrift_container_size_limit=_MOST_THRIFT_ITEMS,
            schema_depth_limit=_MOST_DEPTH,
        )
    except _DAMAGE as error:
        raise IntegrityError(f"{path}: is not a Parquet file: {_first_line(error)}") from None


def read_row_group(
    file: pq.ParquetFile, path: Path | RemoteShard, group: int, *, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read a row group, or some of its columns, with page checksums verified.

    Its size in memory is bounded before anything is decoded.

    Raises:
        IntegrityError: the data is damaged; names the file and the row group.
        CacheError: the shard is behind a URL, and the network failed.
    """
    if isinstance(path, RemoteShard):
        path.load(file.metadata, group, columns)
    try:
        check_row_group(file, path, group, columns)
        return file.read_row_group(group, columns=columns)
    except _DAMAGE as error:
        raise IntegrityError(f"{path}: row group {group} is damaged: {_first_line(error)}; {REMEDY}") from None


def check_beside(root: Path) -> None:
    """Refuse links, and files that another tool might unpickle or run.

    Raises:
        IntegrityError: names the file.
    """
    for folder in (root, root / "data", root / "reports", root / "receipts", root / "tokenizer"):
        if folder != root and folder.is_symlink():
            raise IntegrityError(f"{folder}: is a symbolic link, which may point anywhere; {_COPY}")
        for entry in os.scandir(folder) if folder.is_dir() else ():
            if entry.is_symlink():
                raise IntegrityError(f"{folder / entry.name}: is a symbolic link, which may point anywhere; {_COPY}")
            if Path(entry.name).suffix.lower() in _PICKLED:
                raise IntegrityError(
                    f"{folder / entry.name}: is of a kind that runs code when it is opened, and no part of a cache; move it out"
                )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
