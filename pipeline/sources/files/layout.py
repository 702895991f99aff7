"""Assign the files of a directory to splits.

Files at the top of a directory are splits by their names, and so are sub-directories with usual
split names. `datasets` resolves everything else (`data/train-00000-of-00002.parquet`, the
`configs:` of a README).
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TypeVar

from pipeline.errors import MisuseError, SourceError
from pipeline.sources.files.loading import reason

#: Suffixes of data files, compressed or not.
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
EXPECTED = (
    "a .jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt file (compressed with gz, zst, bz2 or xz too), a glob of such files, or a directory "
    "with one file or folder per split (train.jsonl, test/)"
)
_Path = TypeVar("_Path", bound=PurePath)
#: Suffixes of image files, which are read from folders.
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2")
#: Usual split names, in the order of splits; others follow by name.
USUAL_SPLITS = ("train", "validation", "valid", "val", "dev", "eval", "test")
_SPLIT_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
_NUMBERED = re.compile(r"(?P<split>.+)-(?P<number>\d+)-of-(?P<count>\d+)")
#: Names of parts without a split name: `part-00000-UUID.c000` of Spark, `0003`, `shard-3`.
_PART = re.compile(r"part-\d+.*|\d+|[a-z]+-\d+", re.ASCII | re.IGNORECASE)


def looks_like_path(name: str) -> bool:
    """Return whether a name can only be a local path or glob, not the name of a hub data set.

    It is if it has a suffix of data files, begins with `.`, `~` or `/`, has a `*`, or has more than
    one slash.
    """
    if "://" in name or name.startswith("buckets/"):
        return False
    return name.startswith((".", "~", "/")) or name.count("/") > 1 or suffix(Path(name)) in SUFFIXES or "*" in name


def find_files(path: Path, *, config: str | None = None) -> dict[str, tuple[Path, ...]]:
    """Find the files of each split; usual split names come first, from `train` to `test`.

    A single file, or a glob of parts, is the split `train`. In a directory, hidden files and files
    of other formats are ignored. So are .txt and .json files next to splits in another format
    (LICENSE.txt, label_names.json), unless they have usual split names.

    Args:
        config: the name of a configuration in the README of a directory.

    Raises:
        SourceError: the path does not exist or has no data file, two files are the same split, a
            numbered part is missing, or a name is not a valid split name.
        MisuseError: a configuration is given, but there are none.
    """
    if path.is_dir() and (_has_configs(path) or not _split_folders_and_files(path)):
        found = _by_datasets(path, config)
        if found:
            return _in_order(found)
    if config is not None:
        raise MisuseError(f"{path}: --dataset-config goes with a hub data set or a README with configs, found none")
    if path.is_dir():
        folders = {folder.name: _data_files(folder) for folder in _split_folders(path)}
        return split_directory(str(path), _data_files(path), folders)
    if path.is_file():
        _check_kind(path)
        return {"train": (path,)}
    if glob.has_magic(str(path)):
        return split_glob(str(path), _matches(path))
    raise SourceError(f"{path}: no such file or directory; expected {EXPECTED}, or the name of a hub data set")


def files_named(path: Path, patterns: Iterable[str]) -> dict[str, tuple[Path, ...]]:
    """Find the files of each split by `SPLIT=PATTERN`, with patterns relative to a directory.

    Raises:
        SourceError: no file matches a pattern.
        MisuseError: a value is not of the form `SPLIT=PATTERN`.
    """
    found: dict[str, tuple[Path, ...]] = {}
    for split, pattern in split_patterns(patterns):
        found[split] = (*found.get(split, ()), *_matches(path / Path(pattern).expanduser()))
    return found


def split_patterns(patterns: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield split and pattern of each `SPLIT=PATTERN`.

    Raises:
        MisuseError: a value is not of the form `SPLIT=PATTERN`.
        SourceError: a name is not a valid split name.
    """
    for item in patterns:
        split, separator, pattern = item.partition("=")
        if not separator or not split or not pattern:
            raise MisuseError(f"--data-files {item}: expected SPLIT=PATTERN, such as train=2024/*.jsonl")
        yield check_split_name("--data-files", split), pattern


def check_split_name(where: str, name: str) -> str:
    """Return a split name after checking that files and directories can be named after it.

    Raises:
        SourceError: the name has characters other than letters, digits, _ and dots between them.
    """
    if not _SPLIT_NAME.fullmatch(name):
        raise SourceError(
            f"{where}: {name!r} cannot be a split: expected letters, digits and _; rename it, or say which files are which split with --data-files SPLIT=PATTERN"
        )
    return name


def suffix(path: PurePath) -> str:
    """Return the suffix of the file format, in lower case: `.jsonl` for `train.jsonl.gz`."""
    name = path.name.lower()
    inner = _uncompressed(name)
    found = Path(inner).suffix
    return "" if found in (".parquet", ".arrow") and inner != name else found


def _uncompressed(name: str) -> str:
    return next((name[: -len(end)] for end in COMPRESSIONS if name.lower().endswith(end)), name)


def _stem(path: PurePath) -> str:
    return Path(_uncompressed(path.name)).stem


def _check_kind(path: PurePath) -> None:
    if path.suffix.lower() in IMAGES:
        raise SourceError(
            f"{path}: is an image; train-teacher, estimate and cache-logits read folders of images with --task image-classification --image-column image (init is for texts)"
        )
    if suffix(path) not in SUFFIXES:
        raise SourceError(f"{path}: unknown kind of file; expected {EXPECTED}")


def _matches(pattern: Path) -> list[Path]:
    found = [Path(name) for name in glob.glob(str(pattern), recursive=True)]
    files = [path for path in found if path.is_file()]
    if not files:
        raise SourceError(f"{pattern}: no file matches; expected {EXPECTED}")
    for path in files:
        _check_kind(path)
    return sorted(files, key=natural_order)


def _data_files(folder: Path) -> list[Path]:
    return [f for f in sorted(folder.iterdir()) if f.is_file() and f.name[0] not in "._" and suffix(f) in SUFFIXES]


def _split_folders(path: Path) -> list[Path]:
    """Return the sub-directories with usual split names that hold data files."""
    return [path / name for name in USUAL_SPLITS if (path / name).is_dir() and _data_files(path / name)]


def _split_folders_and_files(path: Path) -> bool:
    return bool(_data_files(path) or _split_folders(path))


def data_files_at(path: Path) -> list[Path]:
    """Return the data files of a directory and of its sub-directories with usual split names."""
    return [*_data_files(path), *(file for folder in _split_folders(path) for file in _data_files(folder))]


def split_directory(
    where: str, files: Sequence[_Path], folders: Mapping[str, Sequence[_Path]]
) -> dict[str, tuple[_Path, ...]]:
    """Assign the data files of a directory to splits.

    Args:
        where: the directory, for messages.
        files: the data files at its top.
        folders: the data files of each sub-directory with a usual split name.

    Raises:
        SourceError: there is no file, two files are the same split, a numbered part is missing, or
            a name is not a valid split name.
    """
    if len({suffix(f) for f in files}) > 1:
        files = [f for f in files if suffix(f) not in (".txt", ".json") or _stem(f) in USUAL_SPLITS] or files
    found = _by_split(where, files)
    for name, members in folders.items():
        if name in found:
            raise SourceError(
                f"{where}: the split {name} is both a folder and a file ({found[name][0].name}); remove one, or name the files with --data-files"
            )
        if members:
            found[name] = tuple(sorted(members, key=natural_order))
    if not found:
        raise SourceError(f"{where}: no data file there; expected {EXPECTED}")
    return _in_order(found)


def split_glob(where: str, files: Sequence[_Path]) -> dict[str, tuple[_Path, ...]]:
    """Assign files to splits by their usual split names; if none has one, all belong to `train`.

    Raises:
        SourceError: some files have usual split names and others do not.
    """
    named = [file for file in files if _split_word(file) in USUAL_SPLITS]
    if not named:
        return {"train": tuple(files)}
    if len(named) < len(files):
        other = next(file for file in files if file not in named)
        raise SourceError(
            f"{where}: matches {named[0].name}, which is named as a split, and {other.name}, which is not; say which is which with --data-files SPLIT=PATTERN"
        )
    return _in_order(_by_split(where, files))


def _split_word(path: PurePath) -> str:
    return re.split(r"[-.]", _stem(path))[0]


def _by_split(where: str, files: Sequence[_Path]) -> dict[str, tuple[_Path, ...]]:
    """Group the files of a directory: numbered parts form one split, any other file is a split."""
    groups: dict[str, list[_Path]] = {}
    for file in files:
        groups.setdefault(_split_of(where, _stem(file)), []).append(file)
    for split, members in groups.items():
        if len(members) > 1 and (
            len({suffix(f) for f in members}) > 1 or len({_stem(f) for f in members}) < len(members)
        ):
            raise SourceError(
                f"{where}: two files for the split {split}: {members[0].name} and {members[1].name}; remove one, or join them"
            )
        _check_parts(where, members)
    return {split: tuple(sorted(members, key=natural_order)) for split, members in groups.items()}


def _split_of(where: str, stem: str) -> str:
    numbered = _NUMBERED.fullmatch(stem)
    if numbered is not None:
        return check_split_name(where, numbered["split"])
    if stem.isdigit() or ("-" in stem and _PART.fullmatch(stem)):
        word = stem.split("-")[0]
        return word if word in USUAL_SPLITS else "train"
    return check_split_name(where, stem)


def _check_parts(where: str, files: Sequence[PurePath]) -> None:
    """Check that numbered parts (`-00000-of-00002`) are complete.

    Raises:
        SourceError: a part is missing.
    """
    numbers: dict[str, set[int]] = {}
    for file in files:
        found = _NUMBERED.fullmatch(_stem(file))
        if found is not None:
            numbers.setdefault(found["count"], set()).add(int(found["number"]))
    for count, there in numbers.items():
        absent = sorted(set(range(int(count))) - there)
        if absent and max(there) < int(count):
            raise SourceError(
                f"{where}: expected {int(count)} parts (-of-{count}), found {len(there)}; part {absent[0]} is missing: fetch it, or rename the files"
            )


def _has_configs(path: Path) -> bool:
    """Return whether the README of a directory assigns files to splits."""
    readme = path / "README.md"
    if not readme.is_file():
        return False
    from huggingface_hub import DatasetCard

    try:
        card = DatasetCard.load(readme, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError):  # the README may have any content
        return False
    return any("data_files" in each for each in card.get("configs") or () if isinstance(each, Mapping))


def _by_datasets(path: Path, config: str | None) -> dict[str, tuple[Path, ...]]:
    """Return the files of each split that `datasets.load_dataset(path)` finds; {}: none."""
    import datasets

    try:
        files = datasets.load_dataset_builder(str(path.absolute()), config).config.data_files
    except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError):
        return {}
    except Exception as error:  # READMEs and files can raise different exceptions
        raise SourceError(
            f"{path}: cannot be read as a data set: {reason(error)}; name the files with --data-files"
        ) from None
    found = {str(split): tuple(Path(name) for name in names) for split, names in (files or {}).items()}
    for members in found.values():
        _check_parts(str(path), members)
        for file in members:
            _check_kind(file)
    return found


def natural_order(path: PurePath) -> list[tuple[int, int, str]]:
    """Return a sort key by which part 2 comes before part 10."""
    pieces = re.split(r"(\d+)", path.as_posix())
    return [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in pieces]


def _in_order(found: Mapping[str, tuple[_Path, ...]]) -> dict[str, tuple[_Path, ...]]:
    return {check_split_name("the data set", split): found[split] for split in sorted(found, key=_split_order)}


def _split_order(split: str) -> tuple[int, str]:
    return USUAL_SPLITS.index(split) if split in USUAL_SPLITS else len(USUAL_SPLITS), split
