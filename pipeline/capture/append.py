"""Appending of rows to a finished cache: new shards under the same contract."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from pipeline.cache import Layout, Plan
from pipeline.cache.format.manifest import Parent, differences, load_manifest
from pipeline.capture.plan import plan_shards
from pipeline.errors import ContractError
from pipeline.records import Ancestor, Contract, ShardPlan
from pipeline.sources import Source, fingerprints, is_of_files


def appended(
    layout: Layout,
    found: Plan,
    wanted: Plan,
    source: Source,
    rows_per_shard: int,
    row_groups: Mapping[str, Sequence[int]],
) -> Plan:
    """Return the plan of a cache after an append: its existing shards and those of the new rows.

    Args:
        found: the plan in the cache directory.
        wanted: the plan of a capture of the whole source.
        row_groups: split -> the first row of each row group that is read as a whole.

    Returns:
        `found` if there are no new rows. Without a manifest: `found` if it is an append under the
            same contract, else `wanted`.

    Raises:
        ContractError: a setting differs, or the cached rows have changed in the source.
    """
    if not layout.manifest.is_file():
        # An appended cache lost a shard: rerunning the same command completes it.
        return found if found.parent is not None and found.contract == wanted.contract else wanted
    manifest = load_manifest(layout.root)
    parent = found.parent
    if parent is None or parent.cache_id != manifest.cache_id:  # not an interrupted append
        parent = Parent(manifest.cache_id, _ends(found.shards))
    there = tuple(shard for shard in found.shards if shard.stop <= parent.rows.get(shard.split, 0))
    _check_prefix(layout, manifest.contract, wanted.contract, source, there)
    starts = {shard.split: shard.start for shard in reversed(wanted.shards)}
    new = {split: (parent.rows.get(split, starts[split]), stop) for split, stop in _ends(wanted.shards).items()}
    more = plan_shards(new, rows_per_shard, after=there, row_groups=row_groups)
    if more:
        ancestors = (*manifest.ancestry, Ancestor(parent.cache_id, "append"))
        return Plan(wanted.contract, (*there, *more), parent, ancestors)
    if found.shards != there:
        raise ContractError(
            f"{layout.name}: --append: {len(found.shards) - len(there)} more shards were begun here, and there are no rows for them; append the same rows as before, or more"
        )
    return found


def new_ranges(plan: Plan, parent: Parent) -> dict[str, tuple[int, int]]:
    """Return the source rows `[start, stop)` that an append adds to each split that grows."""
    new = [shard for shard in plan.shards if shard.stop > parent.rows.get(shard.split, 0)]
    starts = {shard.split: shard.start for shard in reversed(new)}
    return {split: (starts[split], stop) for split, stop in _ends(new).items()}


def _check_prefix(
    layout: Layout, cached: Contract, wanted: Contract, source: Source, there: Sequence[ShardPlan]
) -> None:
    """Check that all settings are equal and that the source still starts with the cached rows.

    Raises:
        ContractError: a setting or the cached rows differ.
    """
    begun = (wanted.source.rows or (0, None))[0], (cached.source.rows or (0, None))[0]
    same = dataclasses.replace(
        wanted,
        source=dataclasses.replace(
            wanted.source,
            fingerprints=cached.source.fingerprints,
            rows=cached.source.rows,
            unlabelled_sources=cached.source.unlabelled_sources,
        ),
    )
    first = next(differences(cached, same), None)
    if first is None and begun[0] != begun[1]:
        first = f"source.rows: expected to begin at {begun[1]}, found {begun[0]}"
    if first is not None:
        raise ContractError(f"{layout.name}: --append: {first}; new rows need the settings of the first ones")
    starts = {shard.split: shard.start for shard in reversed(there)}
    for split, stop in _ends(there).items():
        rows, known = len(source.splits.get(split, ())), cached.source.fingerprints[split]
        first_rows = {split: (starts[split], stop)}
        if rows < stop or fingerprints(source, first_rows, by_contents=not is_of_files(known))[split] != known:
            raise ContractError(
                f"{layout.name}: --append: split {split}: expected the {stop - starts[split]:,} rows that were cached to come first, unchanged, found others "
                f"({rows:,} rows in all); cache the new data set into another --output"
            )


def _ends(shards: Sequence[ShardPlan]) -> dict[str, int]:
    """Return the end (exclusive) of the last shard of each split."""
    return {shard.split: shard.stop for shard in shards}
