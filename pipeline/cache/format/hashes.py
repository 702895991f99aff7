"""SHA-256 of a shard's file and of its footer."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipeline.cache.format.pages import ShardFile, read_footer


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def footer_sha256(path: ShardFile) -> str:
    """Return the SHA-256 of a Parquet file's footer in hexadecimal.

    Raises:
        IntegrityError: the file has no footer.
    """
    return hashlib.sha256(read_footer(path)).hexdigest()
