"""The files of a cache that are published, checked for local paths and credentials."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache import Cache, Layout, verify
from pipeline.cache.format.manifest import NAME
from pipeline.cache.views.reports import write_reports
from pipeline.errors import CacheError
from pipeline.sources.files.loading import redact

#: Vocabulary files are not checked: they may contain any text, and hold no settings.
_VOCABULARIES = re.compile(r"tokenizer/(tokenizer\.json|vocab.*|merges.*|.*\.model|.*\.tiktoken)")
_ABSOLUTE = re.compile(r"(/[^/\s]+){2,}/?|[A-Za-z]:[\\/].*|~/.*|file://.*")
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Contents:
    """The files of a cache to publish: published name -> local path.

    The manifest is separate, since it is published last.
    """

    cache_id: str
    shards: dict[str, Path]
    sha256: dict[str, str]
    """SHA-256 of each shard."""
    others: dict[str, Path]
    """Small files: card, tokenizer, receipts, reports."""
    manifest: Path


def collect(cache: Cache, staging: Path, *, license: str, location: str) -> Contents:
    """Verify a cache, write its card, and list the files to publish.

    The cache's directory is not changed.

    Args:
        staging: an empty directory for the card.
        location: the location of the published cache, for the card.

    Raises:
        IntegrityError: the cache does not match its manifest.
        CacheError: a file contains a local path or a credential.
    """
    verify(cache.root, quick=True).raise_first()
    write_reports(cache, staging, license=license, location=location)
    layout = Layout(cache.root)
    shards = {f"data/{shard.name}.parquet": layout.shard(shard.name) for shard in cache.manifest.shards}
    others = {
        name: path
        for root in (cache.root, staging)  # files in staging replace those of the cache
        for folder in ("tokenizer", "receipts", "reports")
        for name, path in _files(root, folder)
    }
    others["README.md"] = staging / "README.md"
    for name, path in {**others, "manifest.json": layout.manifest}.items():
        check_shareable(name, path)
    hashes = {f"data/{shard.name}.parquet": shard.sha256 for shard in cache.manifest.shards}
    return Contents(cache.manifest.cache_id, shards, hashes, others, layout.manifest)


def check_shareable(name: str, path: Path) -> None:
    """Check that a file contains no local path and no credential.

    Raises:
        CacheError: it does; the message does not contain a credential itself.
    """
    if path.suffix == ".png":
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    for variable, value in os.environ.items():
        if _SECRET.search(variable) and len(value) >= 8 and value in text:
            raise CacheError(f"{path}: holds the value of {variable}; take it out before it is published")
    if _VOCABULARIES.fullmatch(name):
        return
    if name.startswith("tokenizer/"):
        found = re.search(r"\bhf_[A-Za-z0-9]{8,}|://[^/@\s]+:[^/@\s]+@", text)  # other URLs are allowed in templates
    else:
        found = next((line for line in text.splitlines() if redact(line) != line), None)  # type: ignore[assignment]
    if found is not None:
        raise CacheError(
            f"{path}: holds what looks like a token, a password or a signed URL; take it out before it is published"
        )
    if path.suffix == ".json":
        for value in _strings(json.loads(text)):
            if _ABSOLUTE.fullmatch(value):
                raise CacheError(f"{path}: holds a path of this machine ({value}); take it out before it is published")
    home = str(Path.home())
    if len(home) > 1 and f"{home}/" in text:
        raise CacheError(f"{path}: holds a path of this machine (below {home}); take it out before it is published")


def _files(root: Path, folder: str) -> Iterator[tuple[str, Path]]:
    """Regular files of one folder, except hidden, temporary, linked and nested ones."""
    if (root / folder).is_dir():
        for path in sorted((root / folder).iterdir()):
            if NAME.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                yield f"{folder}/{path.name}", path


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
