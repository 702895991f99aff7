"""Folders of images, as `datasets` reads them: `train/cat/1.jpg`, or files beside a `metadata.csv`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import SourceError
from pipeline.sources.files.loading import quiet, reason

if TYPE_CHECKING:
    from datasets import Dataset


def image_folders(path: Path, config: str | None) -> dict[str, Dataset] | None:
    """Split -> rows with the columns `image` (paths) and `label`, where files lie in folders of their class, or those of a metadata file.

    Returns:
        None: `datasets` takes the directory for something else than a folder of images.

    Raises:
        SourceError: it cannot be read.
    """
    import datasets

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
    return {str(split): rows for split, rows in found.items()}
