"""Load folders of images (`train/cat/1.jpg`, or files with a `metadata.csv`) with `datasets`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import SourceError
from pipeline.sources.files.layout import IMAGES, data_files_at
from pipeline.sources.files.loading import quiet, reason

if TYPE_CHECKING:
    from datasets import Dataset


logger = logging.getLogger(__name__)


def image_folders(path: Path, config: str | None) -> dict[str, Dataset] | None:
    """Load a folder of images.

    Returns:
        Rows by split, with the column `image` (paths), and with `label` if files are in folders
        named by class, or with the columns of a metadata file. None: the directory holds data files
        or no images, or `config` is given.

    Raises:
        SourceError: the folder cannot be read.
    """
    import datasets

    if config is not None or any(not file.stem.startswith("metadata") for file in data_files_at(path)):
        return None
    images = sum(file.suffix.lower() in IMAGES for file in path.rglob("*"))
    if not images:
        return None
    try:
        # The builder is loaded by its own name: `datasets` would find a copy cached under the
        # directory's name even after the directory is gone.
        with quiet():
            builder = datasets.load_dataset_builder("imagefolder", data_dir=str(path.resolve()))
            builder.download_and_prepare()
            found = builder.as_dataset()
    except Exception as error:  # each format of metadata raises different exceptions
        raise SourceError(f"{path}: cannot be read as a folder of images: {reason(error)}") from None
    splits = {str(split): rows for split, rows in found.items()}
    for split, rows in splits.items():
        _refuse_stray(path, split, rows)
    read = sum(len(rows) for rows in splits.values())
    if read < images:
        logger.warning(
            "%s: %d of %d images are read, as the splits %s; folders that are no splits, and images that a metadata file leaves out, are skipped",
            *(path, read, images, ", ".join(splits)),
        )
    return splits


def _refuse_stray(path: Path, split: str, rows: Dataset) -> None:
    """Raise `SourceError` if images outside the class folders make `datasets` drop all labels."""
    if set(rows.column_names) != {"image"}:
        return
    folders = {
        Path(image["path"]).parent for image in rows.with_format("arrow")[:]["image"].to_pylist() if image["path"]
    }
    above = next((folder for folder in folders if any(folder in other.parents for other in folders)), None)
    if above is not None:
        stray = next(file.name for file in sorted(above.iterdir()) if file.is_file() and not file.name.startswith("."))
        raise SourceError(
            f"{path}: split {split}: {stray} is outside the folders of the classes, so that no image gets a label; move it, or give the labels in a metadata.csv"
        )
