"""Local data sets: a file, or a directory with one file per split.

`datasets` keeps an Arrow copy of each file under HF_HOME, and takes it again when path and modification time are the
same. Here the copy's name holds the SHA-256 of the file as well, so that a file that was edited is always read anew.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import SourceError
from pipeline.sources.loading import quiet, reason

if TYPE_CHECKING:
    from datasets import Dataset

#: Suffix -> builder of `datasets`. In CSV only an empty cell is missing: "None" and "NA" are words.
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False, "na_values": [""]}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
#: In this order; others follow by name.
_USUAL_SPLITS = ("train", "validation", "valid", "val", "dev", "eval", "test")
_SPLIT_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
_EXPECTED = "a .jsonl, .json, .csv, .parquet or .txt file (.gz too), or a directory with one per split (train.jsonl, test.jsonl)"


def looks_like_path(name: str) -> bool:
    """Whether a name can only mean a local file: it has our suffix, starts as paths do, or is deeper than a hub name."""
    if name.startswith(("hf://", "buckets/")):
        return False
    return name.startswith((".", "~", "/")) or name.count("/") > 1 or _suffix(Path(name)) in _BUILDERS


def find_files(path: Path) -> dict[str, Path]:
    """Split -> file, `train` first and `test` last. A single file is the split `train`.

    In a directory, sub-directories, hidden files and files of other kinds are ignored; so are .txt and .json files beside
    splits in another format (LICENSE.txt, label_names.json), unless they are named as splits usually are.

    Raises:
        SourceError: no such path, no data file there, two files for one split, or a name that no split can have.
    """
    if not path.exists():
        raise SourceError(f"{path}: no such file or directory; expected {_EXPECTED}, or the name of a hub data set")
    if path.is_file():
        if _suffix(path) not in _BUILDERS:
            raise SourceError(f"{path}: unknown kind of file; expected {_EXPECTED}")
        return {"train": path}
    files = [f for f in sorted(path.iterdir()) if f.is_file() and f.name[0] != "." and _suffix(f) in _BUILDERS]
    if len({_suffix(f) for f in files}) > 1:
        files = [f for f in files if _suffix(f) not in (".txt", ".json") or _stem(f) in _USUAL_SPLITS] or files
    if not files:
        raise SourceError(f"{path}: no data file there; expected {_EXPECTED}")
    found: dict[str, Path] = {}
    for file in files:
        split = check_split_name(str(path), _stem(file))
        if split in found:
            raise SourceError(
                f"{path}: two files for the split {split}: {found[split].name} and {file.name}; remove one, or join them"
            )
        found[split] = file
    return {split: found[split] for split in sorted(found, key=_split_order)}


def check_split_name(where: str, name: str) -> str:
    """The name, where shards and directories can be called by it.

    Raises:
        SourceError: it holds other characters than letters, digits, _ and dots between them.
    """
    if not _SPLIT_NAME.fullmatch(name):
        raise SourceError(
            f"{where}: {name!r} cannot be a split: expected letters, digits and _; rename it (one file per split: join the parts of one)"
        )
    return name


def load_file(path: Path) -> Dataset:
    """Read one file through `datasets`, memory-mapped.

    Raises:
        SourceError: it cannot be read as what its suffix says.
    """
    import datasets

    builder, settings = _BUILDERS[_suffix(path)]
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()[:32]
    if path.stat().st_size == 0:
        raise SourceError(f"{path}: no rows; expected at least one")
    files = {"train": glob.escape(str(path.absolute()))}
    try:
        with quiet():
            return datasets.load_dataset(builder, digest, data_files=files, **settings)["train"]
    except Exception as error:  # whatever a parser raises at a broken file
        if "corresponds to no data" in str(error):
            raise SourceError(f"{path}: no rows; expected at least one") from None
        found = (_bad_line(path) if _suffix(path) == ".jsonl" else None) or reason(error)
        raise SourceError(
            f"{path}: cannot be read as {_suffix(path)[1:]}: {found}; mend the file, or convert it"
        ) from error


def _suffix(path: Path) -> str:
    """The suffix that says the kind of file, in lower case: `.jsonl` of `train.jsonl.gz`."""
    name = path.name.lower().removesuffix(".gz")
    suffix = Path(name).suffix
    return "" if suffix == ".parquet" and name != path.name.lower() else suffix


def _stem(path: Path) -> str:
    name = path.name
    return Path(name[: -len(".gz")] if name.lower().endswith(".gz") else name).stem


def _split_order(split: str) -> tuple[int, str]:
    return _USUAL_SPLITS.index(split) if split in _USUAL_SPLITS else len(_USUAL_SPLITS), split


def _bad_line(path: Path) -> str | None:
    """The first line that is no JSON object in valid Unicode: Arrow's own message counts from the start of a block."""
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as handle:
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
