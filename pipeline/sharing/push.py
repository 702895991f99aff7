"""Publish a cache."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache import Cache
from pipeline.config import PushConfig
from pipeline.errors import CacheError
from pipeline.sharing.contents import collect
from pipeline.sharing.hub import push_to_hub, repository
from pipeline.sharing.stores import push_to_store
from pipeline.sources.files.loading import redact


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push has done."""

    url: str
    """What to give to `--cache` and `pull --from`; on the hub with its commit."""
    cache_id: str
    commit: str | None
    sent_bytes: int
    """Of shards; the rest was there."""


def run(config: PushConfig) -> Pushed:
    """`softlabel push`."""
    assert config.license is not None  # checked by the configuration
    return push(config.cache, config.to, license=config.license, public=config.public, revision=config.revision)


def push(
    cache: Cache | str | Path, url: str, *, license: str, public: bool = False, revision: str | None = None
) -> Pushed:
    """Verify a cache and publish it; the manifest comes last, so that nobody reads half of it.

    What is there already is not sent again.

    Args:
        license: of the data, as the hub names it.
        public: the hub: a repository that everyone can read.
        revision: the hub: a branch.

    Raises:
        IntegrityError: the cache is not what its manifest says.
        ContractError: another cache is there, or somebody has published there meanwhile.
        CacheError: it cannot be published: the store refuses, or a file holds a local path or a credential.
    """
    opened = cache if isinstance(cache, Cache) else Cache.open(cache)
    if opened.remote is not None:
        raise CacheError(f"{opened.where}: a cache is pushed from a directory; pull it first")
    is_hub = url.startswith("hf://")
    repo_id = repository(url) if is_hub else None
    shown = redact(url).rstrip("/")
    location = shown if not shown.startswith("file://") else "DIR"
    with tempfile.TemporaryDirectory() as staging:
        contents = collect(opened, Path(staging), license=license, location=location)
        if repo_id is None:
            return Pushed(shown, contents.cache_id, None, push_to_store(contents, url))
        message = f"Soft labels, cache {contents.cache_id[:16]}"
        commit, sent = push_to_hub(contents, repo_id, public=public, revision=revision, message=message)
        return Pushed(f"{shown}@{commit}", contents.cache_id, commit, sent)
