"""Publish a cache."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache import Cache
from pipeline.config import PushConfig
from pipeline.errors import CacheError
from pipeline.progress import size
from pipeline.records import Outline
from pipeline.sharing.contents import collect
from pipeline.sharing.hub import missing_on_hub, push_to_hub, repository
from pipeline.sharing.stores import missing_in_store, push_to_store
from pipeline.sources.files.loading import redact


@dataclass(frozen=True, slots=True)
class Pushed:
    """The result of a push."""

    url: str
    """The URL for `--cache` and `pull --from`; on the hub with the commit."""
    cache_id: str
    commit: str | None
    sent_bytes: int
    """Bytes of shards that were sent; the others were already there."""


def run(config: PushConfig) -> Pushed:
    """Run `softlabel push`."""
    assert config.license is not None  # checked by the configuration
    return push(config.cache, config.to, license=config.license, public=config.public, revision=config.revision)


def push(
    cache: Cache | str | Path, url: str, *, license: str, public: bool = False, revision: str | None = None
) -> Pushed:
    """Verify a cache and publish it; files that are already there are not sent again.

    The manifest is published last, so that readers never see an incomplete cache.

    Args:
        license: the hub's identifier of the data's licence.
        public: hub only: whether everyone can read a new repository.
        revision: hub only: a branch.

    Raises:
        IntegrityError: the cache does not match its manifest.
        ContractError: another cache is there, or was published there meanwhile.
        CacheError: the store rejects a request, or a file contains a local path or a credential.
    """
    opened, repo_id, shown = _opened(cache, url)
    with tempfile.TemporaryDirectory() as staging:
        contents = collect(opened, Path(staging), license=license, location=_location(shown))
        if repo_id is None:
            return Pushed(shown, contents.cache_id, None, push_to_store(contents, url))
        message = f"Soft labels, cache {contents.cache_id[:16]}"
        commit, sent = push_to_hub(contents, repo_id, public=public, revision=revision, message=message)
        return Pushed(f"{shown}@{commit}", contents.cache_id, commit, sent)


def outline(config: PushConfig) -> Outline:
    """Describe what `run` would do; verifies the cache and lists the destination.

    Writes nothing.

    Raises:
        PipelineError: as `push`.
    """
    assert config.license is not None  # checked by the configuration
    opened, repo_id, shown = _opened(config.cache, config.to)
    with tempfile.TemporaryDirectory() as staging:
        contents = collect(opened, Path(staging), license=config.license, location=_location(shown))
        if repo_id is None:
            missing: dict[str, Path] | None = missing_in_store(contents, config.to)
        else:
            missing = missing_on_hub(contents, repo_id, public=config.public, revision=config.revision)
        made = (
            ""
            if missing is not None
            else f"; a {'public' if config.public else 'private'} repository, or a branch, is made"
        )
        sent = sum(path.stat().st_size for path in (contents.shards if missing is None else missing).values())
        total = sum(path.stat().st_size for path in contents.shards.values())
    return (
        (
            "reads",
            f"{opened.where}: cache_id {contents.cache_id[:16]}, {len(contents.shards):,} shards of {size(total)}",
        ),
        (
            "sends",
            f"{size(sent)} of shards, and {len(contents.others) + 1:,} small files; {size(total - sent)} are there already",
        ),
        ("writes", f"{shown}{made}"),
        ("license", config.license),
    )


def _opened(cache: Cache | str | Path, url: str) -> tuple[Cache, str | None, str]:
    """The cache, the repository on the hub if it is one, and the URL without credentials."""
    opened = cache if isinstance(cache, Cache) else Cache.open(cache)
    if opened.remote is not None:
        raise CacheError(f"{opened.where}: a cache is pushed from a directory; pull it first")
    return opened, repository(url) if url.startswith("hf://") else None, redact(url).rstrip("/")


def _location(shown: str) -> str:
    """The location of the published cache, as shown in its card."""
    return shown if not shown.startswith("file://") else "DIR"
