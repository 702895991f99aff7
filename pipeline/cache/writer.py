"""One shard: rows -> Parquet under its final name, whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.codec import pack
from pipeline.cache.commit import write_atomically
from pipeline.cache.crash import reached
from pipeline.cache.pages import ShardFile, read_footer
from pipeline.cache.schema import parquet_settings
from pipeline.records import CachedExample, Shard, ShardPlan

#: Of a row group: what the Hub's viewer and streaming read at once, and what a training window holds.
_MAX_ROWS = 1000
_MAX_BYTES = 16 << 20


def write_shard(path: Path, plan: ShardPlan, rows: Sequence[CachedExample], schema: pa.Schema) -> Shard:
    """Write the rows of one shard, and say what was written.

    Page checksums are written, so that a flipped bit is an error and not data (measured: of 300 flips, the default reader and writer let 283
    through).

    Raises:
        CacheError: the disk is full, or the directory cannot be written.
    """
    groups = list(_row_groups(rows))

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
            for group in groups:
                writer.write_table(pack(group, schema), row_group_size=len(group))
                reached("shard:row-group")

    write_atomically(path, write)
    return Shard(
        name=plan.name,
        split=plan.split,
        rows=len(rows),
        positions=sum(row.example.num_positions for row in rows),
        tokens=sum(row.example.num_tokens for row in rows),
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        row_groups=tuple(len(group) for group in groups),
        footer_sha256=footer_sha256(path),
    )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def footer_sha256(path: ShardFile) -> str:
    """SHA-256 of a Parquet file's footer, hexadecimal.

    Raises:
        IntegrityError: it has none.
    """
    return hashlib.sha256(read_footer(path)).hexdigest()


def _row_groups(rows: Sequence[CachedExample]) -> Iterator[Sequence[CachedExample]]:
    start, size = 0, 0
    for i, row in enumerate(rows):
        size += _memory(row)
        if i > start and (i - start >= _MAX_ROWS or size > _MAX_BYTES):
            yield rows[start:i]
            start, size = i, _memory(row)
    if rows:
        yield rows[start:]


def _memory(row: CachedExample) -> int:
    """Roughly the bytes of a row once read back: what bounds the memory of a training run."""
    soft, example = row.soft, row.example
    texts = [example.text, example.text_pair, *example.kept.values()]
    text = sum(len(value) for value in texts if isinstance(value, str))
    return 8 * example.num_tokens + 8 * (len(soft.top_ids) + len(soft.tail_ids)) + 4 * soft.log_residuals.numel() + text
