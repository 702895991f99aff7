"""Write the rows of one shard to a Parquet file."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.cache.format.codec import pack
from pipeline.cache.format.hashes import file_sha256, footer_sha256
from pipeline.cache.format.moments import moments_of, pooled
from pipeline.cache.format.rows import block_of, gather
from pipeline.cache.format.schema import parquet_settings
from pipeline.cache.storage.commit import write_atomically
from pipeline.cache.storage.crash import reached
from pipeline.records import CachedExample, Moments, RowBlock, Segment, Shard, ShardPlan

#: Limits of a row group: the unit that the Hub's viewer and streaming read at once, and that a
#: training run holds in memory.
_MAX_ROWS = 1000
_MAX_BYTES = 16 << 20


def write_shard(path: Path, plan: ShardPlan, rows: RowBlock | Sequence[CachedExample], schema: pa.Schema) -> Shard:
    """Write the rows of one shard, and return its entry for the shard table.

    Page checksums are written, so that a flipped bit raises an error instead of changing data.
    (Measured: of 300 flips, the default reader and writer miss 283.)

    Raises:
        CacheError: the disk is full, or the directory cannot be written.
    """
    if not len(rows):
        return write_row_groups(path, plan, (), schema)
    block = rows if isinstance(rows, RowBlock) else block_of(rows, schema)
    return write_row_groups(path, plan, (pack(gather([part]), schema) for part in _row_groups(block)), schema)


def write_row_groups(path: Path, plan: ShardPlan, groups: Iterable[pa.Table], schema: pa.Schema) -> Shard:
    """Write one shard from an iterable of row groups, with one of them in memory at a time.

    Without row groups, no file is written.

    Raises:
        CacheError: the disk is full, or the directory cannot be written.
    """
    iterator = iter(groups)
    first = next(iterator, None)
    if first is None:
        return Shard(plan.name, plan.split, 0, 0, 0, 0, "", ())
    sizes: list[tuple[int, int, int]] = []
    scores: list[tuple[Moments, ...]] = []

    def write(temporary: Path) -> None:
        with pq.ParquetWriter(
            temporary,
            schema,
            **parquet_settings(schema),
            write_page_checksum=True,
            write_page_index=True,
            use_content_defined_chunking=True,
            store_schema=False,
        ) as writer:
            for group in itertools.chain([first], iterator):
                writer.write_table(group, row_group_size=group.num_rows)
                sizes.append((group.num_rows, _positions(group), _tokens(group)))
                scores.append(moments_of(group))
                reached("shard:row-group")

    write_atomically(path, write)
    rows, positions, tokens = (sum(size) for size in zip(*sizes, strict=True))
    return Shard(
        name=plan.name,
        split=plan.split,
        rows=rows,
        positions=positions,
        tokens=tokens,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        row_groups=tuple(rows for rows, _, _ in sizes),
        footer_sha256=footer_sha256(path),
        moments=pooled(scores),
    )


def regroup(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Merge small tables, such as those left by a filter, into row groups of the usual size."""
    waiting: list[pa.Table] = []
    for table in tables:
        if table.num_rows == 0:
            continue
        rows, size = (sum(each) for each in zip(*((t.num_rows, t.nbytes) for t in [*waiting, table]), strict=True))
        if waiting and (rows > _MAX_ROWS or size > _MAX_BYTES):
            yield pa.concat_tables(waiting).combine_chunks()
            waiting = []
        waiting.append(table)
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def _positions(table: pa.Table) -> int:
    """Return the number of supervised positions.

    Without the column `supervised`, a row has one position, or one for each of its labels.
    """
    if "supervised" not in table.column_names:
        is_several = "position_labels" in table.column_names
        return _values(table, "position_labels") if is_several else int(table.num_rows)
    return sum(int(chunk.flatten().true_count) for chunk in table.column("supervised").chunks)


def _tokens(table: pa.Table) -> int:
    """Return the number of tokens of all rows; an image counts as one token."""
    return _values(table, "input_ids") if "input_ids" in table.column_names else int(table.num_rows)


def _values(table: pa.Table, name: str) -> int:
    return sum(len(chunk.flatten()) for chunk in table.column(name).chunks)


def _row_groups(block: RowBlock) -> Iterator[Segment]:
    """Split rows into row groups, within the limits of rows and bytes.

    Lists of rankings are kept whole if they fit.
    """
    ends = np.cumsum(_memory(block))
    lists = block.numbers.get("score_group")
    begins = np.zeros(0, dtype=np.int64) if lists is None else 1 + np.flatnonzero(lists[1:] != lists[:-1])
    start = 0
    while start < len(block):
        before = int(ends[start - 1]) if start else 0
        fit = int(np.searchsorted(ends, before + _MAX_BYTES, side="right"))
        stop = min(max(fit, start + 1), start + _MAX_ROWS, len(block))
        whole = begins[(begins > start) & (begins <= stop)]
        if len(whole) and stop < len(block):
            stop = int(whole[-1])
        yield block, start, stop
        start = stop


def _memory(block: RowBlock) -> np.ndarray:
    """Estimate the bytes of each row in memory once it is read, (R,).

    This bounds the memory of a training run.
    """
    lists = block.lists
    size = 8 * lists["input_ids"].counts if "input_ids" in lists else np.zeros(len(block), dtype=np.int64)
    for name in ("logits", "top_ids", "tail_gaps"):
        if name in lists:
            size = size + 8 * lists[name].counts
    if "log_residuals" in lists:
        size = size + 4 * lists["log_residuals"].counts
    for texts in block.others.values():
        if pa.types.is_string(texts.type):
            size = size + pc.fill_null(pc.utf8_length(texts), 0).to_numpy()
        elif pa.types.is_struct(texts.type):
            size = size + pc.fill_null(pc.binary_length(texts.field("bytes")), 0).to_numpy()
    return size
