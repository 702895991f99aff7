"""Load the data set named by `--dataset`, check its columns, and hold out a test split."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import DataConfig
from pipeline.errors import MisuseError, SourceError
from pipeline.records import Columns, LabelColumn
from pipeline.sources.columns import (
    check_alike,
    check_group,
    check_inputs,
    check_kept,
    check_label,
    input_roles,
    one_input,
)
from pipeline.sources.content import held_out
from pipeline.sources.files.arrow import load_files, saved_splits
from pipeline.sources.files.folders import image_folders
from pipeline.sources.files.hub import load_hub
from pipeline.sources.files.joined import JoinedRows, parts_of, with_partial_columns
from pipeline.sources.files.layout import EXPECTED, check_split_name, files_named, find_files, looks_like_path
from pipeline.sources.files.parquet import ParquetRows, of_stream
from pipeline.sources.files.remote import find_urls, is_url, shareable_url
from pipeline.sources.files.told_apart import is_model, missing_path, not_on_the_hub
from pipeline.sources.inputs.images import with_encoded_images
from pipeline.sources.labels import fold
from pipeline.sources.source import Source

if TYPE_CHECKING:
    import datasets

    from pipeline.sources.files.joined import Rows

logger = logging.getLogger(__name__)

#: URL of a whole repository of the Hugging Face Hub; groups: name, revision.
_REPOSITORY = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/?")


@dataclass(frozen=True, slots=True)
class Located:
    """A data set that has been found; its columns are not checked yet."""

    name: str
    """As in `Source`."""
    revision: str | None
    splits: Mapping[str, Rows]


def load_source(
    data: DataConfig, *, label_required: bool = False, holds: LabelColumn = "class", labelled: bool = True
) -> Source:
    """Load a data set from a local path, a URL or the hub, and prepare it for reading.

    An existing local path takes precedence over a hub data set of the same name.

    Args:
        label_required: whether a missing label column is an error.
        holds: what the label column must hold; checked if `label_required`.
        labelled: warn if a label column was named that no split has.

    Raises:
        SourceError: the data set is not found or is empty, or columns are missing or of another
            type.
        MisuseError: a flag for hub data sets is given with a local path or a URL.
    """
    found = locate(data)
    directory = _directory(data.dataset)
    source = _prepare(
        found.name, dict(found.splits), data.columns, data.holdout, data.split, directory, labelled=labelled
    )
    if label_required:
        _require_label(source, data.columns.label, holds)
    return dataclasses.replace(source, config=data.dataset_config, revision=found.revision)


def locate(data: DataConfig) -> Located:
    """Find a data set and its splits, as `load_source` does, without checking its columns.

    Raises:
        SourceError: the data set is not found, or cannot be read.
        MisuseError: a flag for hub data sets is given with a local path or a URL.
    """
    inputs = tuple(input_roles(data.columns).values())
    path = Path(data.dataset).expanduser()
    repository = _REPOSITORY.fullmatch(data.dataset)
    if is_url(data.dataset) and repository is None:
        if data.dataset_revision is not None:
            raise MisuseError(
                f"{shareable_url(data.dataset)}: --dataset-revision goes with a hub data set, found a URL; on the hub write hf://datasets/NAME@REVISION"
            )
        name, revision = shareable_url(data.dataset), None
        files = find_urls(data.dataset, data_files=data.data_files, config=data.dataset_config)
        splits = {split: load_files(urls, inputs) for split, urls in files.items()}
    elif path.exists() or (repository is None and looks_like_path(data.dataset)):
        if data.dataset_revision is not None or (data.dataset_config is not None and not path.is_dir()):
            raise MisuseError(
                f"{data.dataset}: --dataset-config and --dataset-revision go with a hub data set, found a local path"
            )
        if is_model(path):
            raise SourceError(f"{data.dataset}: is a model directory, expected a data set: {EXPECTED}")
        name, revision = _shareable_name(path), None
        folders = image_folders(path, data.dataset_config) if _may_be_folders(path, data) else None
        splits = _local_splits(path, data, inputs) if folders is None else dict(folders)
    else:
        if data.data_files:
            raise MisuseError(f"{data.dataset}: --data-files goes with a local directory, found a hub data set")
        name, revision = data.dataset, data.dataset_revision
        if repository is not None:
            name, revision = repository[1], repository[2] or revision
        try:
            hub, revision = load_hub(name, data.dataset_config, revision)
        except SourceError as error:
            missing = missing_path(data.dataset)
            if missing is None:
                raise
            raise SourceError(
                f"{data.dataset}: {missing}; {not_on_the_hub('data set')}, expected {EXPECTED}, or a hub name"
            ) from error
        splits = dict(hub)
    return Located(name, revision, splits)


def _may_be_folders(path: Path, data: DataConfig) -> bool:
    """Return whether a path may be a directory with folders of image files and no data file."""
    return data.image_column is not None and path.is_dir() and not data.data_files and saved_splits(path) is None


def _local_splits(path: Path, data: DataConfig, inputs: Sequence[str]) -> dict[str, Rows]:
    if data.data_files:
        files = files_named(path, data.data_files)
    else:
        saved = saved_splits(path)
        if saved is not None:
            return dict(saved)
        files = find_files(path, config=data.dataset_config)
    return {split: load_files([str(path) for path in paths], inputs) for split, paths in files.items()}


def from_datasets(
    dataset: datasets.Dataset | datasets.IterableDataset | Mapping[str, datasets.Dataset | datasets.IterableDataset],
    columns: Columns,
    *,
    holdout: float = 0.0,
    splits: tuple[str, ...] = (),
    labelled: bool = True,
) -> Source:
    """Prepare a data set that is already in memory. One without splits becomes the split `train`.

    A `datasets.IterableDataset` (`streaming=True`) is accepted if it reads Parquet files without
    further transforms; the files are read in place.

    Raises:
        SourceError: the object is no data set or is empty, or columns are missing or of another
            type.
        MisuseError: `holdout` is outside [0, 1), or the columns contradict each other.
    """
    import datasets

    if not 0 <= holdout < 1:
        raise MisuseError(f"holdout: expected a share in [0, 1), found {holdout}")
    found: dict[str, Any] = (
        {str(k): v for k, v in dataset.items()} if isinstance(dataset, Mapping) else {"train": dataset}
    )
    for split, part in found.items():
        if isinstance(part, datasets.IterableDataset):
            found[split] = part = of_stream(part) or part
        if not isinstance(part, datasets.Dataset | ParquetRows):
            raise SourceError(
                f"in-memory: split {split}: expected a datasets.Dataset, found {type(part).__name__}; {_instead(dataset, part)}"
            )
    return _prepare("in-memory", found, columns, holdout, splits, None, labelled=labelled)


def _instead(dataset: Any, part: Any) -> str:
    """Return a hint how to make a data set of the object that was given."""
    import datasets

    if isinstance(dataset, Mapping) and isinstance(part, list | tuple) and not (part and isinstance(part[0], Mapping)):
        return "for columns use datasets.Dataset.from_dict(columns)"
    if isinstance(part, list | tuple):
        return "for a list of rows use datasets.Dataset.from_list(rows)"
    if isinstance(part, Mapping):
        return "for columns use datasets.Dataset.from_dict(columns)"
    if isinstance(part, datasets.IterableDataset):
        return "expected Parquet files as they are, without map, filter or shuffle: load it without streaming=True, or make one with datasets.Dataset.from_generator(lambda: iter(rows))"
    if type(part).__name__ == "DataFrame":
        return "for a pandas frame use datasets.Dataset.from_pandas(frame)"
    if isinstance(part, Iterable):
        return "for an iterable of rows use datasets.Dataset.from_generator(lambda: iter(rows))"
    return "give a datasets.Dataset, or a DatasetDict of them"


def _directory(dataset: str) -> Path:
    """Return the directory that paths in a data set are relative to."""
    path = Path(dataset).expanduser().resolve()
    return path if path.is_dir() else path.parent


def _prepare(
    name: str,
    splits: dict[str, Rows],
    columns: Columns,
    holdout: float,
    only: tuple[str, ...],
    directory: Path | None,
    *,
    labelled: bool,
) -> Source:
    """Hold out rows, select the requested splits, and check each of them.

    Args:
        only: the splits to keep; empty: all.
        directory: image paths are relative to it, and caches may refer to files in it; None: paths
            are relative to the current directory, and caches cannot refer to files.
    """
    columns = one_input(columns)
    if not splits:
        raise SourceError(f"{name}: no split; expected at least one data set")
    for split, dataset in splits.items():
        check_split_name(name, split)
        if isinstance(dataset, ParquetRows | JoinedRows):
            splits[split] = with_partial_columns(dataset, (columns.label,) if columns.label is not None else ())
        elif dataset.format["type"] == "custom":  # rows are read without their format
            raise SourceError(
                f"{name}: split {split}: has a transform (with_transform or set_transform), which would not be applied; "
                "apply it with map(), or take it off with reset_format()"
            )
    if columns.image is not None:
        for split, rows in splits.items():
            if columns.image in rows.column_names:  # `check_inputs` reports a missing column
                splits[split] = with_encoded_images(
                    rows, columns.image, directory or Path.cwd(), f"{name}: split {split}"
                )
    share = holdout if "test" not in splits else 0.0
    if share:
        splits = _hold_out(name, splits, columns, share)
    for split in only:
        if split not in splits:
            raise SourceError(f"{name}: no split {split!r}; found {', '.join(splits)}; set --split to one of them")
    splits = {split: dataset for split, dataset in splits.items() if not only or split in only}
    shared = {column for rows in splits.values() for part in parts_of(rows) for column in part.column_names}
    if not labelled:  # the labelled source has them
        shared.update(input_roles(columns).values())
    for split, dataset in splits.items():
        for part in parts_of(dataset):
            if isinstance(part, ParquetRows):
                _warn_of_absent(f"{name}: split {split}", part)
        _check_split(name, split, dataset, columns, shared)
        _tell_unlabelled(f"{name}: split {split}", dataset, columns.label)
    if not any(columns.label in dataset.column_names for dataset in splits.values()):
        if labelled and columns.label not in (None, Columns().label):
            found = dict.fromkeys(column for dataset in splits.values() for column in dataset.column_names)
            logger.warning("%s: no split has the label column %r; found %s", name, columns.label, ", ".join(found))
        columns = dataclasses.replace(columns, label=None)
    where = directory if columns.image is not None else None
    place = name if directory is not None and directory.name == Path(name).name else Path(name).parent.as_posix()
    return Source(name, None, None, splits, columns, share, directory=where, place=place)


def _warn_of_absent(where: str, rows: ParquetRows) -> None:
    """Warn about the first columns that are not in every file."""
    for column, location in list(rows.absent.items())[:3]:
        logger.warning(
            "%s: column %r is not in every file and is not read: %s has none", where, column, shareable_url(location)
        )


def _check_split(name: str, split: str, dataset: Rows, columns: Columns, shared: Collection[str] = ()) -> None:
    where = f"{name}: split {split}"
    if len(dataset) == 0:
        raise SourceError(f"{where}: no rows; expected at least one; leave it out with --split, or fill it")
    if not isinstance(dataset, JoinedRows):
        check_inputs(where, dataset, columns, shared)
        check_kept(where, dataset, columns)
        check_group(where, dataset, columns)
        return
    check_alike(where, dataset, columns)
    names = dataset.names or [where] * len(dataset.parts)
    for file, part in zip(names, dataset.parts, strict=True):
        check_inputs(file, part, columns, shared)
        check_kept(file, part, columns)
        check_group(file, part, columns)


def _tell_unlabelled(where: str, dataset: Rows, label: str | None) -> None:
    """Report rows whose file has no label column, and columns that only differ in spelling."""
    if label is None:
        return
    parts: list[tuple[str, Rows]] = [("", dataset)]
    if isinstance(dataset, JoinedRows):
        parts = list(zip(dataset.names, dataset.parts, strict=True))
    for file, part in parts:
        near = next((name for name in part.column_names if fold(name) == fold(label)), None)
        if near is not None and label not in part.column_names:
            logger.warning(
                "%s: column %r is not read as the label column %r: its %d rows have no label; spell both alike",
                *(f"{where}: {file}" if file else where, near, label, len(part)),
            )
    without = sum(len(part) for _, part in parts if label not in part.column_names)
    if 0 < without < len(dataset):
        logger.info(
            "%s: %d of %d rows are in files without a column %r and have no label",
            *(where, without, len(dataset), label),
        )


def _hold_out(name: str, splits: dict[str, Rows], columns: Columns, share: float) -> dict[str, Rows]:
    """Divide `train` into `train` and `test`; `test` becomes the last split.

    Raises:
        SourceError: there is no `train`, or one of the two would be empty.
    """
    if "train" not in splits:
        raise SourceError(
            f"{name}: --holdout takes rows from the split train; found {', '.join(splits)}; drop --holdout"
        )
    train = splits["train"]
    _check_split(name, "train", train, columns)
    test = held_out(train, columns, share)
    if test.all() or not test.any():
        raise SourceError(
            f"{name}: --holdout {share} puts {int(test.sum())} of {len(test)} rows of train into test, expected some in each; change the share, or add a test split"
        )
    kept, held = (train.select(np.flatnonzero(side)) for side in (~test, test))
    return {**splits, "train": kept, "test": held}


def _require_label(source: Source, column: str | None, holds: LabelColumn) -> None:
    if source.columns.label is None:
        found = ", ".join(next(iter(source.splits.values())).column_names)
        raise SourceError(f"{source.name}: no label column {column!r}; found {found}; name it with --label-column")
    for split, dataset in source.splits.items():
        check_label(f"{source.name}: split {split}", dataset, source.columns, holds=holds)


def _shareable_name(path: Path) -> str:
    """Return a relative path as given; of a path that is absolute or has "..", the last part."""
    if path.is_absolute() or ".." in path.parts:
        return path.resolve().name
    return path.as_posix() if path.name else path.resolve().name
