"""How the files of a data set and of `--unlabelled` are written in the section `data`."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config import DataConfig
from pipeline.sources.batches import read_rows
from pipeline.sources.files.arrow import is_saved
from pipeline.sources.files.layout import find_files, looks_like_path
from pipeline.sources.files.remote import is_url
from pipeline.sources.prepare import locate

#: Maximum number of files that are listed individually.
_MOST_FILES = 12


def local_files(dataset: str) -> dict[str, tuple[Path, ...]] | None:
    """Split -> files of a local data set with at most `_MOST_FILES` files; else None."""
    path = Path(dataset).expanduser()
    if is_url(dataset) or not (path.exists() or looks_like_path(dataset)) or is_saved(path):
        return None
    files = find_files(path)
    return files if sum(map(len, files.values())) <= _MOST_FILES else None


def listed_files(data: DataConfig, files: Mapping[str, Sequence[Path]]) -> DataConfig:
    """The section `data` with files listed by name, relative to a common directory."""
    path = Path(data.dataset).expanduser()
    every = [file for members in files.values() for file in members]
    if len({file.is_absolute() for file in every}) > 1:
        files = {split: [file.absolute() for file in members] for split, members in files.items()}
        every = [file.absolute() for file in every]
    root = path if path.is_dir() else Path(os.path.commonpath([file.parent for file in every]))
    names = [
        f"{split}={glob.escape(os.path.relpath(file, root))}" for split, members in files.items() for file in members
    ]
    return dataclasses.replace(data, dataset=root.as_posix(), data_files=tuple(names))


def with_unlabelled_files(data: DataConfig, unlabelled: Sequence[str]) -> tuple[DataConfig, tuple[str, ...]]:
    """Add unlabelled rows to the files of `train`, or else to the section `cache-logits`.

    Returns:
        The section `data`, and `unlabelled` of the section `cache-logits`. The latter is used if a
        name is not a local file, or a file has labels, which must not be read.
    """
    if not unlabelled:
        return data, ()
    files = local_files(data.dataset)
    paths = [Path(name).expanduser() for name in unlabelled]
    if files is None or "train" not in files or not all(path.is_file() for path in paths):
        return data, tuple(unlabelled)
    if any(_has_labels(name, data.label_column) for name in unlabelled):
        return data, tuple(unlabelled)
    return listed_files(data, {**files, "train": (*files["train"], *paths)}), ()


def _has_labels(name: str, column: str) -> bool:
    found = locate(DataConfig(dataset=name)).splits.values()
    return any(
        row.get(column) not in (None, "")
        for rows in found
        if column in rows.column_names
        for row in read_rows(rows, [column])
    )
