"""Where a cache lies: a local directory, or behind any URL that fsspec opens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import CacheError
from pipeline.sources.loading import reason, redact

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def is_url(location: str) -> bool:
    """Whether it is a URL; anything else is a local path."""
    return "://" in location


def open_filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path in it, without a slash at the end.

    Credentials are those of the environment, as each file system reads them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, HF_TOKEN).

    Raises:
        CacheError: no file system of this scheme, or its package is missing; the URL's credentials are not shown.
    """
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        hint = "; pip install s3fs" if url.startswith("s3://") and isinstance(error, ImportError) else ""
        raise CacheError(f"{redact(url)}: cannot be opened: {reason(error)}{hint}") from None
    return filesystem, str(path).rstrip("/")
