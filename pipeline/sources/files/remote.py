"""Assign data files behind an fsspec URL (`s3://`, `https://`, `hf://`, `gs://`) to splits."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from pipeline.errors import MisuseError, SourceError
from pipeline.sources.files.layout import (
    EXPECTED,
    SUFFIXES,
    USUAL_SPLITS,
    check_split_name,
    natural_order,
    split_directory,
    split_glob,
    split_patterns,
    suffix,
)
from pipeline.sources.files.loading import reason, redact
from pipeline.sources.files.parquet import filesystem_of

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

#: The start of a web address after conversion to a path, which keeps only one slash.
_WEB = re.compile(r"^(https?):/(?!/)")


def is_url(name: str) -> bool:
    """Return whether the name of a data set is a URL."""
    return "://" in name


def shareable_url(url: str) -> str:
    """Remove credentials and the query string, which may hold a signature, from a URL."""
    return redact(url.partition("?")[0] if url.startswith(("http://", "https://")) else url)


def find_urls(url: str, *, data_files: Iterable[str] = (), config: str | None = None) -> dict[str, tuple[str, ...]]:
    """Find the URLs of the files of each split, in order, by the rules for local files.

    Args:
        data_files: `SPLIT=PATTERN` each, relative to the URL.
        config: the name of a configuration in the README of a directory.

    Raises:
        SourceError: nothing is found, there is no access, or the files cannot be assigned.
        MisuseError: a configuration is given, but there are none.
    """
    filesystem, path = filesystem_of(url)
    try:
        if data_files:
            return _files_named(filesystem, path, data_files)
        if any(character in path for character in "*["):
            return _urls(filesystem, split_glob(shareable_url(url), _matches(filesystem, path)))
        if suffix(_name(path)) in SUFFIXES:
            filesystem.info(path)  # raises if the file does not exist
            return {"train": (str(filesystem.unstrip_protocol(path)),)}
        return _in_directory(filesystem, path, config)
    except (SourceError, MisuseError):
        raise
    except FileNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):  # raised by the HTTP file system
            raise SourceError(
                f"{shareable_url(url)}: cannot be reached: {reason(error)}; check the URL and the connection"
            ) from None
        raise SourceError(
            f"{shareable_url(url)}: not found, or access denied; expected {EXPECTED}; check the URL and the credentials"
        ) from None
    except Exception as error:  # file systems raise different exceptions
        raise SourceError(
            f"{shareable_url(url)}: cannot be read: {reason(error)}; check the URL and the credentials"
        ) from error


def _in_directory(filesystem: AbstractFileSystem, path: str, config: str | None) -> dict[str, tuple[str, ...]]:
    where = shareable_url(str(filesystem.unstrip_protocol(path)))
    entries = filesystem.ls(path, detail=True)
    readme = next((entry["name"] for entry in entries if PurePosixPath(entry["name"]).name == "README.md"), None)
    patterns = None if readme is None else _configured(filesystem.cat_file(readme), config, where)
    if patterns is None and config is not None:
        raise MisuseError(f"{where}: --dataset-config goes with a hub data set or a README with configs, found none")
    if patterns is None:
        top = _data_files(entries)
        folders = {
            PurePosixPath(entry["name"]).name: _data_files(filesystem.ls(entry["name"], detail=True))
            for entry in entries
            if entry["type"] == "directory" and PurePosixPath(entry["name"]).name in USUAL_SPLITS
        }
        if top or any(folders.values()):
            return _urls(filesystem, split_directory(where, top, folders))
    return _by_datasets(str(filesystem.unstrip_protocol(path)), patterns, where)


def _configured(readme: bytes, config: str | None, where: str) -> Any:
    """Return the `data_files` of a configuration in a README; None: it has no configurations."""
    from huggingface_hub import DatasetCard

    try:
        data: Any = DatasetCard(readme.decode(), ignore_metadata_errors=True).data
        card = data.to_dict()
    except ValueError:  # the README may have any content
        return None
    configs = {
        str(each.get("config_name", "default")): each for each in card.get("configs") or () if isinstance(each, dict)
    }
    configs = {name: each for name, each in configs.items() if "data_files" in each}
    if not configs:
        return None
    standard = [name for name, each in configs.items() if each.get("default") or name == "default" or len(configs) == 1]
    name = config or next(iter(standard), "none")
    if name not in configs:
        raise SourceError(
            f"{where}: expected one of the configurations {', '.join(configs)}, found {name}; name one with --dataset-config"
        )
    return configs[name]["data_files"]


def _by_datasets(url: str, patterns: Any, where: str) -> dict[str, tuple[str, ...]]:
    """Resolve patterns to URLs by split with `datasets`; without patterns, by its own rules."""
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns, sanitize_patterns

    try:
        found = sanitize_patterns(patterns) if patterns is not None else get_data_patterns(url)
    except EmptyDatasetError:
        raise SourceError(f"{where}: no data file there; expected {EXPECTED}") from None
    files = DataFilesDict.from_patterns(found, base_path=url, allowed_extensions=list(SUFFIXES))
    return {check_split_name(where, str(split)): tuple(map(str, names)) for split, names in files.items()}


def _files_named(filesystem: AbstractFileSystem, path: str, data_files: Iterable[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for split, pattern in split_patterns(data_files):
        matches = _matches(filesystem, f"{path.rstrip('/')}/{pattern}")
        found[split] = (*found.get(split, ()), *_urls(filesystem, {split: tuple(matches)})[split])
    return found


def _matches(filesystem: AbstractFileSystem, pattern: str) -> list[PurePosixPath]:
    names = filesystem.glob(pattern)
    files = [_name(str(name)) for name in names if suffix(_name(str(name))) in SUFFIXES]
    if not files:
        where = shareable_url(str(filesystem.unstrip_protocol(pattern)))
        raise SourceError(f"{where}: no file matches; expected {EXPECTED}")
    return sorted(files, key=natural_order)


def _data_files(entries: Iterable[dict[str, Any]]) -> list[PurePosixPath]:
    files = [_name(str(entry["name"])) for entry in entries if entry["type"] == "file"]
    return sorted(file for file in files if file.name[:1] not in (".", "_") and suffix(file) in SUFFIXES)


def _name(path: str) -> PurePosixPath:
    """Return a path; of a web address, without the query string."""
    return PurePosixPath(path.partition("?")[0] if path.startswith(("http://", "https://")) else path)


def _urls(filesystem: AbstractFileSystem, files: dict[str, tuple[PurePosixPath, ...]]) -> dict[str, tuple[str, ...]]:
    return {
        split: tuple(str(filesystem.unstrip_protocol(_WEB.sub(r"\1://", str(file)))) for file in members)
        for split, members in files.items()
    }
