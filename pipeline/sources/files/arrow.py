"""Data files: Parquet is read in place, everything else through `datasets`.

`datasets` keeps an Arrow copy of each file under HF_HOME, and takes it again when path and modification time are the
same. Here the copy's name holds the SHA-256 of the file as well, so that a file that was edited is always read anew.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import json
import logging
import lzma
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from pipeline.errors import SourceError
from pipeline.sources.files.layout import suffix
from pipeline.sources.files.loading import quiet, reason, redact
from pipeline.sources.files.parquet import parquet_rows

if TYPE_CHECKING:
    from datasets import Dataset

    from pipeline.sources.files.joined import OneRows

logger = logging.getLogger(__name__)

#: Suffix -> builder of `datasets`. In CSV only an empty cell is missing: "None" and "NA" are words.
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False, "na_values": [""]}),
    ".tsv": ("csv", {"sep": "\t", "keep_default_na": False, "na_values": [""]}),
    ".arrow": ("arrow", {}),
    ".txt": ("text", {}),
}

#: What a line of a compressed file is read with; of `.zst` only `datasets` reads the rows.
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def load_files(locations: Sequence[str]) -> OneRows:
    """The rows of the files of one split, one file after another: local paths, or URLs.

    Raises:
        SourceError: one cannot be read as what its suffix says, or two are of different kinds.
    """
    kinds = sorted({suffix(PurePath(location.partition("?")[0])) for location in locations})
    if len(kinds) > 1:
        raise SourceError(
            f"{redact(locations[0])}: expected files of one kind in a split, found {', '.join(kinds)}; convert some"
        )
    if kinds == [".parquet"]:
        return parquet_rows(locations)
    return _converted(locations, kinds[0])


def _converted(locations: Sequence[str], kind: str) -> Dataset:
    """The files as `datasets` makes Arrow of them, once."""
    paths = [Path(location) for location in locations if "://" not in location]
    for path in paths:
        if path.stat().st_size == 0:
            raise SourceError(f"{path}: no rows; expected at least one")
    try:
        return _prepared(locations, paths, kind)
    except Exception as error:  # whatever a parser raises at a broken file
        where: str | Path = redact(locations[0])
        if len(locations) > 1:
            where = f"{redact(locations[0].rpartition('/')[0])} ({len(locations)} files)"
        if "corresponds to no data" in str(error):
            raise SourceError(f"{where}: no rows; expected at least one") from None
        lines = ((path, _bad_line(path)) for path in paths if suffix(path) == ".jsonl")
        bad = next(((path, line) for path, line in lines if line is not None), None)
        if bad is not None:
            where = bad[0]
        found = reason(error) if bad is None else bad[1]
        raise SourceError(f"{where}: cannot be read as {kind[1:]}: {found}; mend the file, or convert it") from error


def _prepared(locations: Sequence[str], paths: Sequence[Path], kind: str) -> Dataset:
    import datasets

    builder, settings = _BUILDERS[kind]
    files = {"train": [glob.escape(str(path.absolute())) for path in paths] or list(locations)}
    with quiet():
        made = datasets.load_dataset_builder(builder, _digest(paths) if paths else None, data_files=files, **settings)
        folder = Path(made.cache_dir)
        is_new = not folder.is_dir()
        made.download_and_prepare()
        found: Dataset = made.as_dataset(split="train")
    if is_new:
        size = sum(file.stat().st_size for file in folder.iterdir())
        logger.info(
            "converted to Arrow once: %.1f MB under %s (HF_DATASETS_CACHE moves it)",
            size / 1e6,
            datasets.config.HF_DATASETS_CACHE,
        )
    return found


def saved_splits(path: Path) -> dict[str, Dataset] | None:
    """The splits of a directory that `save_to_disk` wrote; None where it is none. A single data set is `train`.

    Raises:
        SourceError: it cannot be read.
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
    """Whether `save_to_disk` wrote a directory."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _digest(paths: Sequence[Path]) -> str:
    """Of the files' bytes: 32 hexadecimal digits."""
    digests = []
    for path in paths:
        with path.open("rb") as handle:
            digests.append(hashlib.file_digest(handle, "sha256").hexdigest())
    return (digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest())[:32]


def _bad_line(path: Path) -> str | None:
    """The first line that is no JSON object in valid Unicode: Arrow's own message counts from the start of a block."""
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
