"""How the files of a data set and those of `--unlabelled` stand in the section `data`."""

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

#: More files are not listed one by one.
_MOST_FILES = 12


def local_files(dataset: str) -> dict[str, tuple[Path, ...]] | None:
    """Split -> files, where a data set is a few files on this machine."""
    path = Path(dataset).expanduser()
    if is_url(dataset) or not (path.exists() or looks_like_path(dataset)) or is_saved(path):
        return None
    files = find_files(path)
    return files if sum(map(len, files.values())) <= _MOST_FILES else None


def listed_files(data: DataConfig, files: Mapping[str, Sequence[Path]]) -> DataConfig:
    """The same data with its files by name, relative to a directory above all of them."""
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
    """Where the rows without labels are named: among the files of `train`, or in `cache-logits`.

    Returns:
        The section `data`, and `unlabelled` of the section `cache-logits`: names of what is no file
            on this machine, or of
        files with labels, which are not to be read.
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
