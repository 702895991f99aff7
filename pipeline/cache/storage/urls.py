"""Locations of caches: local directories, or any URL that fsspec opens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import CacheError
from pipeline.sources.files.loading import reason, redact

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def is_url(location: str) -> bool:
    """Whether a location is a URL; anything else is a local path."""
    return "://" in location


def open_filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a URL, and the path in it without a trailing slash.

    Credentials come from the environment, as each file system reads them (AWS_ACCESS_KEY_ID,
    AWS_ENDPOINT_URL, HF_TOKEN).

    Raises:
        CacheError: there is no file system for this scheme, or its package is missing. The message
            does not show the URL's credentials.
    """
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        hint = "; pip install s3fs" if url.startswith("s3://") and isinstance(error, ImportError) else ""
        raise CacheError(f"{redact(url)}: cannot be opened: {reason(error)}{hint}") from None
    return filesystem, str(path).rstrip("/")


def pinned(url: str) -> str:
    """Resolve a hub URL to its current commit, so that its contents do not change while it is read.

    Other URLs are returned unchanged.

    Raises:
        CacheError: there is no such repository or revision.
    """
    if not url.startswith("hf://"):
        return url
    from huggingface_hub import HfApi

    from pipeline.cache.storage.transfer import patiently

    filesystem, path = open_filesystem(url)
    filesystem.invalidate_cache()
    try:
        found = patiently(redact(url), lambda: filesystem.resolve_path(path))
        info = patiently(
            redact(url),
            lambda: HfApi().repo_info(found.repo_id, repo_type=found.repo_type, revision=found.revision),
        )
    except FileNotFoundError as error:
        raise CacheError(f"{redact(url)}: no cache here: {reason(error)}") from None
    return f"hf://{found.repo_type}s/{found.repo_id}@{info.sha}/{found.path_in_repo}".rstrip("/")
