"""Data sets of the Hugging Face hub, through `datasets.load_dataset`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import SourceError
from pipeline.sources.loading import reason, redact

if TYPE_CHECKING:
    from datasets import Dataset

_COMMIT = re.compile(r"[0-9a-f]{40}")


def load_hub(name: str, config: str | None, revision: str | None) -> tuple[dict[str, Dataset], str | None]:
    """Download (or take from the local cache) every split of a hub data set.

    Returns:
        The splits, and the commit that they are of: `revision` as it was asked for where `datasets` does not tell.

    Raises:
        SourceError: no such data set, configuration or revision, no access, or no connection.
    """
    import datasets

    try:
        found = datasets.load_dataset(name, config, revision=revision)
    except Exception as error:  # the hub client, the parsers and the file systems each have their own
        raise SourceError(
            f"{redact(name)}: cannot be loaded from the Hugging Face hub: {reason(error)}; {_hint(error)}"
        ) from error
    if not isinstance(found, Mapping):
        found = {"train": found}
    commit = next((c for dataset in found.values() if (c := _commit(dataset)) is not None), None)
    if commit is not None and revision is not None and _COMMIT.fullmatch(revision) and commit != revision:
        raise SourceError(
            f"{name}: expected revision {revision}, found {commit} in the local cache, and the hub does not answer; check the connection"
        )
    return dict(found), commit or revision


def _commit(dataset: Dataset) -> str | None:
    """The commit: `datasets` keeps what it made of one in a directory of that name."""
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
