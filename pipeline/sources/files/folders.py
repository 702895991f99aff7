"""Folders of images, as `datasets` reads them: `train/cat/1.jpg`, or files beside a `metadata.csv`."""

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
    """Split -> rows with the columns `image` (paths) and `label`, where files lie in folders of their class, or those of a metadata file.

    Returns:
        None: there are data files, or `datasets` takes the directory for something else than a
            folder of images.

    Raises:
        SourceError: it cannot be read.
    """
    import datasets

    if config is not None or any(not file.stem.startswith("metadata") for file in data_files_at(path)):
        return None
    images = sum(file.suffix.lower() in IMAGES for file in path.rglob("*"))
    if not images:
        return None
    try:
        with quiet():  # by the builder's own name: what is kept under the directory's would be found in place of a directory that is missing
            builder = datasets.load_dataset_builder("imagefolder", data_dir=str(path.resolve()))
            builder.download_and_prepare()
            found = builder.as_dataset()
    except Exception as error:  # each kind of metadata file has errors of its own
        raise SourceError(f"{path}: cannot be read as a folder of images: {reason(error)}") from None
    splits = {str(split): rows for split, rows in found.items()}
    for split, rows in splits.items():
        _refuse_stray(path, split, rows)
    read = sum(len(rows) for rows in splits.values())
    if read < images:
        logger.warning(
            "%s: %d of %d images are read, as the splits %s: folders beside those of splits, and images that a metadata file leaves out, are not",
            *(path, read, images, ", ".join(splits)),
        )
    return splits


def _refuse_stray(path: Path, split: str, rows: Dataset) -> None:
    """Raise `SourceError` where `datasets` gives no labels because some images lie beside the folders of the classes."""
    if set(rows.column_names) != {"image"}:
        return
    folders = {
        Path(image["path"]).parent for image in rows.with_format("arrow")[:]["image"].to_pylist() if image["path"]
    }
    above = next((folder for folder in folders if any(folder in other.parents for other in folders)), None)
    if above is not None:
        stray = next(file.name for file in sorted(above.iterdir()) if file.is_file() and not file.name.startswith("."))
        raise SourceError(
            f"{path}: split {split}: {stray} lies beside the folders of the classes, so that no image has a label; move it, or give the labels in a metadata.csv"
        )
