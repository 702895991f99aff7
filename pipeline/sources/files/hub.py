"""Load data sets of the Hugging Face Hub: Parquet in place, others with `load_dataset`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import SourceError
from pipeline.sources.files.loading import reason, redact
from pipeline.sources.files.parquet import parquet_rows

if TYPE_CHECKING:
    from datasets import Dataset

    from pipeline.sources.files.joined import OneRows

#: URL of a file of the hub at one commit.
_PINNED = re.compile(r"hf://datasets/[^@]+@([0-9a-f]{40})/")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def load_hub(name: str, config: str | None, revision: str | None) -> tuple[dict[str, OneRows], str | None]:
    """Load all splits of a hub data set.

    Parquet files are read in place; others are downloaded, or read from the local cache.

    Returns:
        The splits, and their commit, or the requested `revision` if the commit is not known.

    Raises:
        SourceError: the data set, configuration or revision does not exist, or there is no access
            or no connection.
    """
    import datasets

    try:
        in_place = _in_place(name, config, revision)
        if in_place is not None:
            return in_place
        found = datasets.load_dataset(name, config, revision=revision)
    except Exception as error:  # hub client, parsers and file systems raise different exceptions
        raise SourceError(
            f"{redact(name)}: cannot be loaded from the Hugging Face hub: {reason(error)}; {_hint(error)} (no local file or directory has this name)"
        ) from error
    if not isinstance(found, Mapping):
        found = {"train": found}
    commit = next((c for dataset in found.values() if (c := _commit(dataset)) is not None), None)
    if commit is not None and revision is not None and _COMMIT.fullmatch(revision) and commit != revision:
        raise SourceError(
            f"{name}: expected revision {revision}, found {commit} in the local cache, and the hub does not answer; check the connection"
        )
    return dict(found), commit or revision


def _in_place(name: str, config: str | None, revision: str | None) -> tuple[dict[str, OneRows], str | None] | None:
    """Open the Parquet files of a hub data set in place.

    Returns:
        Splits and revision; None if there are files of other formats, or `HF_HUB_OFFLINE` is set.
    """
    import datasets
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return None
    builder = datasets.load_dataset_builder(name, config, revision=revision)
    files = {str(split): [str(url) for url in urls] for split, urls in (builder.config.data_files or {}).items()}
    urls = [url for members in files.values() for url in members]
    if not urls or not all(url.startswith("hf://") and url.endswith(".parquet") for url in urls):
        return None
    found = _PINNED.match(urls[0])
    splits: dict[str, OneRows] = {
        split: parquet_rows(members, builder.info.features) for split, members in files.items()
    }
    return splits, revision if found is None else found[1]


def _commit(dataset: Dataset) -> str | None:
    """Return the commit of a data set; `datasets` names the cache directory after it."""
    folders = [Path(file["filename"]).parent.name for file in dataset.cache_files]
    return next((folder for folder in folders if _COMMIT.fullmatch(folder)), None)


def _hint(error: Exception) -> str:
    from datasets.exceptions import DatasetNotFoundError

    if isinstance(error, DatasetNotFoundError):
        return "check the name and the revision, or log in with `hf auth login` if it is private or gated; a local data set is given by its path"
    if isinstance(error, ConnectionError):
        return "check the connection, or download the data set and give its path"
    if isinstance(error, ValueError) and "onfig" in str(error):
        return "name one of its configurations with --dataset-config"
    return "check the name, --dataset-config and --dataset-revision, or download the data set and give its path"
