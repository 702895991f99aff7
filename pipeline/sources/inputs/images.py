"""Read the encoded bytes of images from rows or files, and make file paths absolute."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import BadRowError, SourceError
from pipeline.records import Image
from pipeline.sources.columns import describe
from pipeline.sources.files.joined import JoinedRows, OneRows, parts_of
from pipeline.sources.files.parquet import ParquetRows
from pipeline.sources.values import kind_of

if TYPE_CHECKING:
    from pipeline.sources.files.joined import Rows


def read_image(name: str, value: object, directory: Path | None = None, called: str = "") -> Image:
    """Read a value of an image column: {bytes, path} or bytes.

    Args:
        directory: the directory of the data set.
        called: the prefix of the recorded paths of files in the directory.

    Raises:
        BadRowError: the value is null, of another type or empty, or the file cannot be read; the
            message begins with `name`.
    """
    found = value
    path: object = None
    if isinstance(value, Mapping):
        found, path = value.get("bytes"), value.get("path")
    if found is None and isinstance(path, str):
        try:
            found = Path(path).read_bytes()
        except OSError as error:
            where = _place(path, directory, called) or Path(path).name
            raise BadRowError(f"{name}: {where}: {error.strerror or type(error).__name__}") from None
    if found is None:
        raise BadRowError(f"{name} is null")
    if not isinstance(found, bytes):
        raise BadRowError(f"{name}: expected the bytes of an image, found {kind_of(found)}")
    if not found:
        raise BadRowError(f"{name} is empty")
    if not isinstance(path, str):
        return Image(found)
    return Image(found, Path(path).name, _place(path, directory, called))


def _place(path: str, directory: Path | None, called: str) -> str | None:
    """Return `called` joined with a file's path relative to the directory; None: outside it."""
    if directory is None or not Path(path).is_relative_to(directory):
        return None
    return (Path(called) / Path(path).relative_to(directory)).as_posix()


def image_identity(value: object) -> str | None:
    """Return the SHA-256 of an image's bytes, independent of its path; None: it is unreadable."""
    try:
        return hashlib.sha256(read_image("", value).data).hexdigest()
    except BadRowError:
        return None


def with_encoded_images(rows: Rows, column: str, root: Path, where: str) -> Rows:
    """Change an image column so that images stay encoded and file paths are absolute.

    Args:
        root: the directory that paths are relative to.
        where: the start of messages.

    Raises:
        SourceError: a Parquet file that is read in place holds paths.
    """
    parts = [_encoded(part, column, root, where) for part in parts_of(rows)]
    return JoinedRows(parts, names=rows.names) if isinstance(rows, JoinedRows) else parts[0]


def _encoded(rows: OneRows, column: str, root: Path, where: str) -> OneRows:
    import datasets

    feature: Any = rows.features.get(column)
    if isinstance(feature, datasets.Image):
        feature = dataclasses.replace(feature, decode=False)
        return (
            rows.with_feature(column, feature) if isinstance(rows, ParquetRows) else rows.cast_column(column, feature)
        )
    if describe(feature) != "text":
        return rows
    if isinstance(rows, ParquetRows):
        raise SourceError(
            f"{where}: column {column!r} (--image-column): expected images or bytes in Parquet files, found text; "
            "name the files of images in CSV or JSON Lines, or embed them"
        )
    paths = [
        None if path is None else os.path.normpath(root / Path(path).expanduser())
        for path in rows.with_format(None)[column][:]
    ]
    images = [{"bytes": None, "path": path} for path in paths]
    spare = f"{column} "  # a temporary name, since a table without columns loses its rows
    while spare in rows.column_names:
        spare += " "
    with_both = rows.add_column(spare, images, feature=datasets.Image(decode=False))
    return with_both.remove_columns(column).rename_column(spare, column)
