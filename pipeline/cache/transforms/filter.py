"""Make a cache from some rows of another: by a SQL condition, by split, or both.

This is also how to sample and split a cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.cache.format.manifest import NAME
from pipeline.cache.reading.reader import Cache
from pipeline.cache.transforms.condition import Condition
from pipeline.cache.transforms.rewrite import Piece, Rewrite, ancestry, plan_pieces, rewrite, shard_schema
from pipeline.errors import CacheError, MisuseError


def filter_rows(
    cache: Cache | str | Path,
    output: str | Path,
    *,
    where: str | None = None,
    splits: Sequence[str] = (),
    as_split: str | None = None,
    overwrite: bool = False,
) -> Cache:
    """Keep the rows for which a condition is true.

    Args:
        where: SQL over the columns of a row, in DuckDB's dialect. None: every row.
        splits: the splits to keep. Default: all.
        as_split: a new name for the one split that is kept.

    Returns:
        The new cache. Rows do not change; shards of which all rows are kept are copied as bytes.

    Raises:
        MisuseError: the condition is not valid, or there is nothing to do.
        CacheError: there is no such split, or no row is left; see `rewrite`.
    """
    planned = plan_filter(cache, output, where=where, splits=splits, as_split=as_split)
    return rewrite(planned, overwrite=overwrite)


def plan_filter(
    cache: Cache | str | Path,
    output: str | Path,
    *,
    where: str | None = None,
    splits: Sequence[str] = (),
    as_split: str | None = None,
) -> Rewrite:
    """Check the inputs of `filter_rows` and return the planned rewrite.

    The condition is tested on an empty table.
    """
    opened = cache if isinstance(cache, Cache) else Cache.open(cache)
    if where is None and not splits and as_split is None:
        raise MisuseError("filter: give --where, --split or --as-split")
    for split in splits:
        if split not in opened.splits:
            raise CacheError(f"{opened.root}: no split {split!r}; the cache has {', '.join(opened.splits)}")
    chosen = list(dict.fromkeys(splits)) or list(opened.splits)
    if as_split is not None and (len(chosen) != 1 or not NAME.fullmatch(as_split)):
        raise MisuseError(
            f"--as-split {as_split}: expected a plain name for one split, found {', '.join(chosen)}; name one with --split"
        )
    schema = shard_schema(opened)
    condition = None if where is None else Condition(where, schema)

    def change(piece: Piece) -> Iterable[pa.Table] | None:
        if condition is None:
            return None
        masks = [condition.keep(table) for table in piece.row_groups()]
        return None if all(mask.all() for mask in masks) else _masked(piece, masks)

    what = ", ".join([*([] if where is None else [f"where {where}"]), *(f"split {name}" for name in splits)])
    return Rewrite(
        name="filter",
        output=output,
        pieces=plan_pieces([opened], chosen, as_split=as_split),
        change=change,
        contract=opened.manifest.contract,
        schema=schema,
        ancestors=ancestry([opened], f"filter {what}".strip() + (f" as {as_split}" if as_split else "")),
        nothing=f"--where {where!r}: is true for no row; nothing is written",
    )


def _masked(piece: Piece, masks: Sequence[np.ndarray]) -> Iterable[pa.Table]:
    for table, mask in zip(piece.row_groups(), masks, strict=True):
        if mask.any():
            yield table.filter(pa.array(mask))
