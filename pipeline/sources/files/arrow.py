"""Load data files: Parquet is read in place, other formats are converted by `datasets`.

`datasets` keeps an Arrow copy of each file under HF_HOME, and reuses it if path and modification
time are the same. Here the name of the copy also includes the SHA-256 of the file, so that an
edited file is always converted again.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import hashlib
import itertools
import json
import logging
import lzma
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from pipeline.errors import SourceError
from pipeline.sources.files.joined import JoinedRows
from pipeline.sources.files.layout import suffix
from pipeline.sources.files.loading import quiet, reason, redact
from pipeline.sources.files.parquet import parquet_rows

if TYPE_CHECKING:
    from datasets import Dataset

    from pipeline.sources.files.joined import OneRows, Rows

logger = logging.getLogger(__name__)

#: Suffix -> builder of `datasets`, with settings. In CSV, only an empty cell is null; "None" and
#: "NA" are text.
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False, "na_values": [""]}),
    ".tsv": ("csv", {"sep": "\t", "keep_default_na": False, "na_values": [""]}),
    ".arrow": ("arrow", {}),
    ".txt": ("text", {}),
}

_MAX_HEADER_BYTES = 1 << 16
#: Number of lines after the first that are checked for a separator.
_MOST_LINES = 20
#: Names that pandas and Arrow give to unnamed fields.
_INDEX = re.compile(r"__index_level_[0-9]+__")
#: A first line, written by spreadsheets, that declares the separator.
_SAID = re.compile(r"(?i:sep)=[;,|\t]")
#: Functions that open compressed files here; `.zst` files are read by `datasets` only.
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def load_files(locations: Sequence[str], inputs: Sequence[str] = ()) -> Rows:
    """Load the files of one split, in order.

    Files may have different formats and columns. A column that a file lacks is null in its rows.

    Args:
        locations: local paths or URLs.
        inputs: columns that a model reads. If some of their values are null, files are read one by
            one, so that messages can name the file.

    Raises:
        SourceError: a file cannot be read in the format that its suffix names.
    """
    names: list[str] = []
    parts: list[OneRows] = []
    for (kind, separator), members in itertools.groupby(locations, key=_kind):
        group = list(members)
        found = [parquet_rows(group)] if kind == ".parquet" else _converted(group, kind, separator, inputs)
        names += group if len(found) == len(group) else group[:1]
        parts += found
    return parts[0] if len(parts) == 1 else JoinedRows(parts, names=[redact(name) for name in names])


def _kind(location: str) -> tuple[str, str | None]:
    """Return a file's suffix, and the separator of its columns; None: the suffix's usual one."""
    kind = suffix(PurePath(location.partition("?")[0]))
    if kind != ".csv" or "://" in location:
        return kind, None
    lines = _first_lines(Path(location), 1 + _MOST_LINES)
    said = _SAID.fullmatch(lines[0])
    if said is not None:
        return kind, said[0]
    names = re.sub(r'"[^"]*"', "", lines[0])
    return kind, None if "," in names else next((sign for sign in (";", "\t") if _separates(sign, names, lines)), None)


def _separates(sign: str, names: str, lines: Sequence[str]) -> bool:
    """Return whether a sign separates columns in the first line and in at least half of the others.

    Args:
        names: the first line, without its quoted parts.
    """
    if sign not in names:
        return False
    try:
        rows = [row for row in csv.reader([f"{line}\n" for line in lines[1:]], delimiter=sign) if row]
    except csv.Error:  # very long fields, or line ends of another operating system
        return True
    return 2 * sum(len(row) > 1 for row in rows) >= len(rows)


def _csv_settings(kind: str, separator: str | None) -> dict[str, Any]:
    """Return the builder's settings for a CSV or TSV file.

    A separator such as `sep=;` is a first line that declares it, which is skipped.
    """
    if separator is None:
        return _BUILDERS[kind][1]
    skipped = {"skiprows": 1} if _SAID.fullmatch(separator) else {}
    return {**_BUILDERS[kind][1], "sep": separator[-1], **skipped}


def _first_lines(path: Path, most: int) -> list[str]:
    """Return the first lines of a text file, compressed or not, up to a very long one.

    If the file cannot be read, return one empty line; the reader then reports the error.
    """
    if path.suffix.lower() == ".zst":
        return [""]
    try:
        with _OPENERS.get(path.suffix.lower(), open)(path, "rb") as handle:
            lines = list(itertools.takewhile(bool, (handle.readline(_MAX_HEADER_BYTES) for _ in range(most))))
    except (OSError, EOFError, lzma.LZMAError):
        return [""]
    whole = [*lines[:1], *itertools.takewhile(lambda line: len(line) < _MAX_HEADER_BYTES, lines[1:])]
    return [line.decode("utf-8-sig", "replace").rstrip("\r\n") for line in whole] or [""]


def _header(path: Path, settings: Mapping[str, Any]) -> list[str]:
    """Return the column names in the first line of a CSV or TSV file."""
    line = _first_lines(path, settings.get("skiprows", 0) + 1)[-1]
    return next(csv.reader([line], delimiter=settings.get("sep", ",")), [])


def _columns_differ(paths: Sequence[Path], kind: str, separator: str | None) -> bool:
    """Return whether CSV or TSV files have different columns, by their first lines."""
    if kind not in (".csv", ".tsv"):
        return False
    settings = _csv_settings(kind, separator)
    return len({frozenset(_header(path, settings)) for path in paths}) > 1


def _converted(locations: Sequence[str], kind: str, separator: str | None, inputs: Sequence[str]) -> list[Dataset]:
    """Convert files to Arrow with `datasets`: together, or one by one if their columns differ."""
    paths = [Path(location) for location in locations if "://" not in location]
    for path in paths:
        if path.stat().st_size == 0:
            raise SourceError(f"{path}: no rows; expected at least one")
    try:
        apart = _columns_differ(paths, kind, separator)
        parts = _one_by_one(locations, kind, separator) if apart else None
        if parts is not None:
            return parts
        found = _prepared(locations, kind, separator)
        nulls = any(found.data.column(name).null_count for name in inputs if name in found.column_names)
        parts = _one_by_one(locations, kind, separator) if nulls else None
        return [found] if parts is None else parts
    except SourceError:
        raise
    except Exception as error:  # parsers raise various exceptions for a broken file
        parts = _one_by_one(locations, kind, separator)
        if parts is not None:
            return parts
        where: str | Path = redact(locations[0])
        if len(locations) > 1:
            where = f"{redact(locations[0].rpartition('/')[0])} ({len(locations)} files)"
        if "corresponds to no data" in str(error):
            raise SourceError(f"{where}: no rows; expected at least one") from None
        for path in paths:
            if (found_kind := _disguise(path)) is not None:
                raise SourceError(f"{path}: cannot be read as {kind[1:]}: {found_kind}") from None
        lines = ((path, _bad_line(path)) for path in paths if suffix(path) == ".jsonl")
        bad = next(((path, line) for path, line in lines if line is not None), None)
        if bad is not None:
            where = bad[0]
        why = reason(error) if bad is None else bad[1]
        hint = "save it as UTF-8" if "codec can't decode" in why else "repair the file, or convert it"
        raise SourceError(f"{where}: cannot be read as {kind[1:]}: {why}; {hint}") from error


def _one_by_one(locations: Sequence[str], kind: str, separator: str | None) -> list[Dataset] | None:
    """Convert each file separately.

    Returns:
        None if there is only one file, one cannot be read, or all have the same columns and types.
    """
    if len(locations) == 1:
        return None
    try:
        parts = [_prepared([location], kind, separator) for location in locations]
    except SourceError:
        raise
    except Exception:  # the caller reports the error
        return None
    return parts if any(part.features != parts[0].features for part in parts) else None


def _prepared(locations: Sequence[str], kind: str, separator: str | None) -> Dataset:
    import datasets

    builder, settings = _BUILDERS[kind][0], _csv_settings(kind, separator)
    paths = [Path(location) for location in locations if "://" not in location]
    files = {"train": [glob.escape(str(path.absolute())) for path in paths] or list(locations)}
    with quiet():
        made = datasets.load_dataset_builder(builder, _digest(paths) if paths else None, data_files=files, **settings)
        folder = Path(made.cache_dir)
        is_new = not folder.is_dir()
        made.download_and_prepare()
        found: Dataset = made.as_dataset(split="train")
    if builder == "csv":
        _check_index(redact(locations[0]), found, paths, settings)
    if is_new:
        size = sum(file.stat().st_size for file in folder.iterdir())
        logger.info(
            "converted to Arrow once: %.1f MB under %s (HF_DATASETS_CACHE moves it)",
            size / 1e6,
            datasets.config.HF_DATASETS_CACHE,
        )
    return found


def _check_index(where: str, found: Dataset, paths: Sequence[Path], settings: Mapping[str, Any]) -> None:
    """Check that rows do not have more fields than the first line has names.

    pandas would turn the first fields of such rows into an index.

    Raises:
        SourceError: rows have more fields than there are names.
    """
    index = [name for name in found.column_names if _INDEX.fullmatch(name)]
    if index and not (paths and index[0] in _header(paths[0], settings)):
        raise SourceError(
            f"{where}: rows have more fields than the first line; put quotes around texts with commas or whatever separates "
            "the columns, or name every column in the first line"
        )


def _disguise(path: Path) -> str | None:
    """Detect a zip or UTF-16 file by its first bytes, and return a message; None: it is neither."""
    with path.open("rb") as handle:
        start = handle.read(4)
    if start == b"PK\x03\x04":
        return "is a spreadsheet or zip; save it as CSV"
    return "is UTF-16; save it as UTF-8" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else None


def saved_splits(path: Path) -> dict[str, Dataset] | None:
    """Load the splits of a directory that `save_to_disk` wrote; None: it is no such directory.

    A data set without splits becomes `train`.

    Raises:
        SourceError: the directory cannot be read.
    """
    if not is_saved(path):
        return None
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # a file that is missing or damaged
        raise SourceError(f"{path}: cannot be read as a saved data set: {reason(error)}; save it again") from None
    return {str(k): v for k, v in found.items()} if isinstance(found, Mapping) else {"train": found}


def is_saved(path: Path) -> bool:
    """Return whether a directory was written by `save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _digest(paths: Sequence[Path]) -> str:
    """Return a digest of the files' contents, 32 hexadecimal digits."""
    digests = []
    for path in paths:
        with path.open("rb") as handle:
            digests.append(hashlib.file_digest(handle, "sha256").hexdigest())
    return (digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest())[:32]


def _bad_line(path: Path) -> str | None:
    """Describe the first line that is no JSON object in valid Unicode; None: there is none.

    Arrow's own message counts lines from the start of a block.
    """
    if path.suffix.lower() == ".zst":
        return None
    with _OPENERS.get(path.suffix.lower(), open)(path, "rb") as handle:
        try:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    try:
                        value = json.loads(line)
                        json.dumps(value, ensure_ascii=False).encode()
                    except json.JSONDecodeError as error:
                        return f"line {number}, column {error.colno}: {error.msg}"
                    except UnicodeError as error:
                        return f"line {number}: {error}"
                    if not isinstance(value, dict):
                        return f"line {number}: expected an object, found {type(value).__name__}"
        except OSError:
            return None
    return None
