"""Folders of images, as `datasets` reads them: `train/cat/1.jpg`, or files beside a `metadata.csv`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import SourceError
from pipeline.sources.files.layout import data_files_at
from pipeline.sources.files.loading import quiet, reason

if TYPE_CHECKING:
    from datasets import Dataset


def image_folders(path: Path, config: str | None) -> dict[str, Dataset] | None:
    """Split -> rows with the columns `image` (paths) and `label`, where files lie in folders of their class, or those of a metadata file.

    Returns:
        None: there are data files, or `datasets` takes the directory for something else than a folder of images.

    Raises:
        SourceError: it cannot be read.
    """
    import datasets

    if any(not file.stem.startswith("metadata") for file in data_files_at(path)):
        return None
    try:
        with quiet():
            builder = datasets.load_dataset_builder(str(path.absolute()), config)
            if not type(builder).__module__.endswith(".imagefolder"):
                return None
            builder.download_and_prepare()
            found = builder.as_dataset()
    except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError):
        return None
    except Exception as error:  # each kind of metadata file has errors of its own
        raise SourceError(f"{path}: cannot be read as a folder of images: {reason(error)}") from None
    splits = {str(split): rows for split, rows in found.items()}
    for split, rows in splits.items():
        _refuse_stray(path, split, rows)
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
