"""Merge several caches of one contract into one, without duplicate rows."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.cache.format.manifest import differences
from pipeline.cache.reading.reader import Cache
from pipeline.cache.transforms.rewrite import Piece, Rewrite, ancestry, plan_pieces, rewrite, shard_schema
from pipeline.errors import ContractError, MisuseError
from pipeline.records import Contract, SourceInfo

logger = logging.getLogger(__name__)

#: Settings of a contract in which caches to merge may differ, since they do not change what is
#: stored of a row: where rows come from, and how the work was split up.
MAY_DIFFER = ("source", "versions", "seed", "batch_tokens", "on_bad_row", "tokenization.max_length")


def merge(caches: Sequence[Cache | str | Path], output: str | Path, *, overwrite: bool = False) -> Cache:
    """Join the shards of caches; of rows in a split with the same `content_hash`, keep the first.

    Args:
        caches: caches whose contracts differ at most in `MAY_DIFFER`. The merged contract has the
            longest `max_length`, the first seed, and the names, fingerprints and versions of all.

    Returns:
        The merged cache. Besides one row group, 17 bytes per row are held in memory.

    Raises:
        MisuseError: there are fewer than two caches.
        ContractError: names the first setting that differs.
        CacheError: see `rewrite`.
    """
    return rewrite(plan_merge(caches, output), overwrite=overwrite)


def plan_merge(caches: Sequence[Cache | str | Path], output: str | Path) -> Rewrite:
    """Check the inputs of `merge` and return the planned rewrite.

    The content hashes of all rows are read.
    """
    opened = [cache if isinstance(cache, Cache) else Cache.open(cache) for cache in caches]
    if len(opened) < 2:
        raise MisuseError("merge: expected two caches or more; repeat --cache")
    for other in opened[1:]:
        _check_alike(opened[0], other)
    splits = list(dict.fromkeys(split for cache in opened for split in cache.splits))
    pieces = plan_pieces(opened, splits)
    masks = _keep_first(opened, splits)

    def change(piece: Piece) -> Iterable[pa.Table] | None:
        mask = masks[piece.plan.split][piece.plan.start : piece.plan.stop]
        return None if mask.all() else _masked(piece, mask)

    return Rewrite(
        name="merge",
        output=output,
        pieces=pieces,
        change=change,
        contract=_merged([cache.manifest.contract for cache in opened]),
        schema=shard_schema(opened[0]),
        ancestors=ancestry(opened, "merge"),
        nothing="merge: the caches have no rows",
    )


def _check_alike(expected: Cache, found: Cache) -> None:
    for line in differences(expected.manifest.contract, found.manifest.contract):
        where = line.partition(":")[0]
        if not any(where == name or where.startswith(f"{name}.") for name in MAY_DIFFER):
            raise ContractError(
                f"{found.root}: differs from {expected.root} in {line}; caches to merge may differ in {', '.join(MAY_DIFFER)} only"
            )


def _keep_first(caches: Sequence[Cache], splits: Sequence[str]) -> dict[str, np.ndarray]:
    """Return for each split (rows,) bool over all caches: whether a row's content is new."""
    masks, seen = {}, np.zeros(0, dtype=np.uint64)
    for split in splits:
        parts = [_identities(cache, split) for cache in caches if split in cache.splits]
        hashes = np.concatenate(parts).astype(np.uint64)
        unique, first = np.unique(hashes, return_index=True)
        masks[split] = np.zeros(len(hashes), dtype=bool)
        masks[split][first] = True
        if len(unique) < len(hashes):
            logger.info("%s: %d rows of equal content, kept once", split, len(hashes) - len(unique))
        shared = len(np.intersect1d(unique, seen, assume_unique=True))
        if shared:
            logger.warning(
                "%s: %d rows are in another split too; training rows would be used for testing", split, shared
            )
        seen = np.union1d(seen, unique)
    return masks


def _identities(cache: Cache, split: str) -> np.ndarray:
    """Return (rows,) uint64: the content hash of each row, combined with its list in rankings."""
    dataset = cache.dataset(split)
    found: np.ndarray = dataset.column("content_hash").astype(np.uint64)
    if "score_group" in cache.manifest.contract.columns:
        with np.errstate(over="ignore"):
            found = found ^ (dataset.column("score_group").astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return found


def _masked(piece: Piece, mask: np.ndarray) -> Iterable[pa.Table]:
    start = 0
    for table in piece.row_groups():
        yield table.filter(pa.array(mask[start : start + table.num_rows]))
        start += table.num_rows


def _merged(contracts: Sequence[Contract]) -> Contract:
    first = contracts[0]
    return dataclasses.replace(
        first,
        source=_merged_source([contract.source for contract in contracts]),
        tokenization=dataclasses.replace(
            first.tokenization, max_length=max(contract.tokenization.max_length for contract in contracts)
        ),
        versions=_joined([contract.versions for contract in contracts]),
        on_bad_row="skip" if any(contract.on_bad_row == "skip" for contract in contracts) else "stop",
    )


def _merged_source(sources: Sequence[SourceInfo]) -> SourceInfo:
    """Merge the descriptions of the sources.

    Names are joined. The fingerprint of a split is the hash of the fingerprints of all sources that
    have it. Other settings that differ become None.
    """
    first = sources[0]
    if all(source == first for source in sources):
        return first
    splits = dict.fromkeys(split for source in sources for split in source.fingerprints)
    fingerprints = {
        split: _hash(source.fingerprints[split] for source in sources if split in source.fingerprints)
        for split in splits
    }
    configs, revisions = ({getattr(s, name) for s in sources} for name in ("config", "revision"))
    return dataclasses.replace(
        first,
        name=" + ".join(dict.fromkeys(source.name for source in sources)),
        config=first.config if len(configs) == 1 else None,
        revision=first.revision if len(revisions) == 1 else None,
        fingerprints=fingerprints,
        label_map=first.label_map if all(source.label_map == first.label_map for source in sources) else (),
    )


def _joined(versions: Sequence[Mapping[str, str]]) -> dict[str, str]:
    names = dict.fromkeys(name for each in versions for name in each)
    return {name: ", ".join(dict.fromkeys(each[name] for each in versions if name in each)) for name in names}


def _hash(fingerprints: Iterable[str]) -> str:
    found = list(dict.fromkeys(fingerprints))
    return found[0] if len(found) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest()
