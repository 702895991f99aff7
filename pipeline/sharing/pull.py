"""Download a cache, or a part of it.

Files get their final name after verification; the manifest is written last.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cache import Cache, Layout, verify
from pipeline.cache.format.hashes import file_sha256
from pipeline.cache.format.manifest import dump, load_manifest, make_manifest
from pipeline.cache.reading.remote import (
    check_sha256,
    check_sizes,
    fetch_manifest,
    fetch_tokenizer,
    list_files,
    read_small,
)
from pipeline.cache.storage.commit import create_exclusively, write_atomically, write_text
from pipeline.cache.storage.transfer import patiently, read_range
from pipeline.cache.storage.urls import is_url, open_filesystem, pinned
from pipeline.cache.views.card import card_license
from pipeline.cache.views.reports import write_reports
from pipeline.config import PullConfig
from pipeline.errors import CacheError, ContractError, MisuseError
from pipeline.progress import Progress, size
from pipeline.records import Ancestor, Manifest, Outline, Shard
from pipeline.sharing.stores import in_parallel
from pipeline.sources.files.loading import redact

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

#: Bytes per request, and number of parallel downloads.
_PART = 8 << 20
_PARALLEL = 4
#: Directory of files that are not verified yet.
_WORK = ".pull"


def run(config: PullConfig) -> Cache:
    """Run `softlabel pull`."""
    return pull(config.from_, config.output, splits=config.split, shards=config.shards)


def pull(url: str | Path, output: str | Path, *, splits: Sequence[str] = (), shards: Sequence[str] = ()) -> Cache:
    """Download a cache and verify it; resumes an interrupted download.

    Args:
        url: a URL, or a directory.
        splits: splits to download; empty: all.
        shards: one number, to download that many shards from the start of each split; or names of
            shards; empty: all.

    Returns:
        The copy. A partial copy is a cache with its own id, whose manifest names the original.

    Raises:
        MisuseError: a split or shard does not exist.
        ContractError: the output directory holds another cache.
        IntegrityError: a downloaded file does not match the manifest.
        CacheError: the URL holds no finished cache, or the network failed.
    """
    source, root = _source(url), Path(output)
    work = root / _WORK
    _refuse_other_files(root)
    work.mkdir(parents=True, exist_ok=True)
    parent = fetch_manifest(source, work)
    manifest = part_of(parent, splits, shards)
    if _is_there(root, manifest):
        shutil.rmtree(work)
        return Cache.open(root)
    if manifest is parent:
        check_sizes(source, parent)
    _fetch_shards(source, manifest.shards, root)
    fetch_tokenizer(source, work, manifest)
    shutil.rmtree(root / "tokenizer", ignore_errors=True)
    os.replace(work / "tokenizer", root / "tokenizer")
    cache = Cache(root, manifest)
    if manifest is parent:
        _fetch_rest(source, root)
    else:
        _describe_part(source, cache)
    cache.check_files()
    if not create_exclusively(Layout(root).manifest, dump(manifest)) and not _is_there(root, manifest):
        raise ContractError(f"{root}: another cache was written there meanwhile; use another --output")
    shutil.rmtree(work)
    return Cache.open(root)


def outline(config: PullConfig) -> Outline:
    """Describe what `run` would do, from the remote manifest; writes nothing.

    Raises:
        PipelineError: as `pull`, except for errors in the content of shards.
    """
    source, root = _source(config.from_), Path(config.output)
    _refuse_other_files(root)
    with tempfile.TemporaryDirectory() as folder:
        parent = fetch_manifest(source, Path(folder))
    manifest = part_of(parent, config.split, config.shards)
    if manifest is parent:
        check_sizes(source, parent)
    finished = Layout(root).manifest.is_file()
    if finished:
        _check_same(root, manifest)
    sizes = {path.name: path.stat().st_size for folder in (root / "data", root / _WORK) for path in folder.glob("*")}
    have = sum(
        shard.bytes if sizes.get(f"{shard.name}.parquet") == shard.bytes else sizes.get(f"{shard.name}.part", 0)
        for shard in manifest.shards
    )
    total, rows = (sum(getattr(shard, name) for shard in manifest.shards) for name in ("bytes", "rows"))
    return (
        ("reads", f"{redact(str(config.from_))}: cache_id {parent.cache_id[:16]}, {len(parent.shards):,} shards"),
        ("rows", f"{rows:,} in {', '.join(manifest.splits)}, {len(manifest.shards):,} shards of {size(total)}"),
        ("fetches", f"{size(total - have)} of shards; {size(have)} are there already"),
        ("writes", f"{root}" + ("; a finished cache is there" if finished else "")),
    )


def _source(url: str | Path) -> str:
    return pinned(str(url)) if is_url(str(url)) else Path(url).resolve().as_uri()


def part_of(parent: Manifest, splits: Sequence[str], shards: Sequence[str]) -> Manifest:
    """The manifest of some splits and shards; the parent itself if they are all.

    Raises:
        MisuseError: a split or shard does not exist.
    """
    unknown = [split for split in splits if split not in parent.splits]
    if unknown:
        raise MisuseError(f"--split {unknown[0]}: the cache has {', '.join(parent.splits)}")
    chosen = [shard for shard in parent.shards if not splits or shard.split in splits]
    if len(shards) == 1 and shards[0].isdigit():
        first = {
            shard.name
            for split in dict.fromkeys(s.split for s in chosen)
            for shard in parent.split_shards(split)[: int(shards[0])]
        }
        chosen = [shard for shard in chosen if shard.name in first]
    elif shards:
        names = [shard.name for shard in chosen]
        wrong = [name for name in shards if name not in names]
        if wrong:
            raise MisuseError(f"--shards {wrong[0]}: the cache has {', '.join(names[:8])}{', ...' * (len(names) > 8)}")
        chosen = [shard for shard in chosen if shard.name in shards]
    if tuple(chosen) == parent.shards:
        return parent
    words = [word for flag, values in (("--split", splits), ("--shards", shards)) for v in values for word in (flag, v)]
    ancestor = Ancestor(parent.cache_id, shlex.join(["pull", *words]))
    return make_manifest(
        parent.contract,
        tuple(chosen),
        bad_rows=parent.bad_rows,
        probe=parent.probe,
        ancestry=(*parent.ancestry, ancestor),
    )


def _is_there(root: Path, manifest: Manifest) -> bool:
    """Whether the directory holds exactly this cache, complete."""
    if not Layout(root).manifest.is_file():
        return False
    _check_same(root, manifest)
    if verify(root, quick=True).problems:  # intact shards are kept, by SHA-256
        Layout(root).manifest.unlink()
        return False
    return True


def _check_same(root: Path, manifest: Manifest) -> None:
    there = load_manifest(root)
    if there.cache_id != manifest.cache_id:
        raise ContractError(
            f"{root}: holds another cache (cache_id {there.cache_id[:12]}..., not {manifest.cache_id[:12]}...); use another --output"
        )


def _refuse_other_files(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise CacheError(f"{root}: expected a directory, found a file")
    is_ours = (root / _WORK).is_dir() or Layout(root).manifest.is_file() or Layout(root).plan.is_file()
    if root.is_dir() and not is_ours and any(not path.name.startswith(".") for path in root.iterdir()):
        raise CacheError(f"{root}: holds files that are no cache; use an empty or a new directory")


def _fetch_shards(url: str, shards: Sequence[Shard], root: Path) -> None:
    with Progress("pull", sum(s.bytes for s in shards), unit="B") as progress:
        in_parallel(lambda shard: _fetch_shard(url, shard, root, progress), list(shards), _PARALLEL)


def _fetch_shard(url: str, shard: Shard, root: Path, progress: Progress) -> None:
    """Download one shard; resumes a partial file and gives it its final name once verified."""
    final = Layout(root).shard(shard.name)
    if final.is_file() and final.stat().st_size == shard.bytes and file_sha256(final) == shard.sha256:
        progress.update(shard.bytes)
        return
    where = f"{redact(url)}/data/{shard.name}.parquet"
    part = root / _WORK / f"{shard.name}.part"
    filesystem, path = open_filesystem(url)
    have = part.stat().st_size if part.is_file() else 0
    try:
        with part.open("ab" if have <= shard.bytes else "wb") as handle:
            start = have if have <= shard.bytes else 0
            progress.update(start)
            while start < shard.bytes:
                stop = min(start + _PART, shard.bytes)
                handle.write(_read(where, filesystem, f"{path}/data/{shard.name}.parquet", start, stop))
                progress.update(stop - start)
                start = stop
            handle.flush()
            os.fsync(handle.fileno())
        found = file_sha256(part)
        if found != shard.sha256:
            part.unlink()
        check_sha256(where, shard, found)
        final.parent.mkdir(exist_ok=True)
        os.replace(part, final)
    except OSError as error:
        raise CacheError(f"{part}: cannot be written ({error.strerror or error}); run the same command again") from None


def _read(where: str, filesystem: AbstractFileSystem, path: str, start: int, stop: int) -> bytes:
    try:
        return patiently(where, lambda: read_range(filesystem, path, start, stop))
    except FileNotFoundError:
        raise CacheError(f"{where}: expected a shard that manifest.json lists, found no such file") from None


def _fetch_rest(url: str, root: Path) -> None:
    """Download card, receipts and reports unchanged."""
    names = [f"{folder}/{name}" for folder in ("receipts", "reports") for name in list_files(url, folder)]
    for name in [*names, "README.md"]:
        try:
            data = read_small(url, name)
        except FileNotFoundError:  # the card is optional
            continue
        write_atomically(root / name, partial(_write, data=data))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _describe_part(url: str, cache: Cache) -> None:
    """Write the card of a partial copy; licence, fidelity and bad rows are the whole cache's."""
    names = list_files(url, "reports")
    for name in ("fidelity.json", "bad-rows.tsv"):
        if name in names:
            write_text(cache.root / "reports" / name, read_small(url, f"reports/{name}").decode())
    try:
        license = card_license(read_small(url, "README.md").decode())
    except FileNotFoundError:
        license = None
    write_reports(cache, cache.root, license=license)
