"""What a capture sets out to make: ranges of source rows, cut by a rule that depends on the source and the settings only."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import pyarrow as pa

from pipeline.errors import SourceError
from pipeline.records import Encoding, Full, Sampled, ShardPlan, TopK
from pipeline.sources import Source
from pipeline.tasks import Task

_TARGET_BYTES = 128 << 20
_MOST_ROWS = 10_000
#: Above this, one row of `full` language-model logits is refused.
MAX_ROW_BYTES = 64 << 20


def plan_shards(source: Source, rows_per_shard: int) -> tuple[ShardPlan, ...]:
    """Cut every split into shards of so many source rows."""
    return tuple(
        ShardPlan(f"{split}-{number:05d}", split, start, min(start + rows_per_shard, len(rows)))
        for split, rows in source.splits.items()
        for number, start in enumerate(range(0, len(rows), rows_per_shard))
    )


def default_rows_per_shard(encoding: Encoding, num_classes: int, *, max_length: int, token_classes: bool) -> int:
    """Source rows whose shard stays around 128 MB, at a guess from above of the bytes a position."""
    if isinstance(encoding, Full):
        per_position = 4 * num_classes
    elif isinstance(encoding, Sampled):
        per_position = int(2 * encoding.sample_size)
    else:
        per_position = 4 * encoding.k if isinstance(encoding, TopK) else 256
    row_bytes = max_length * (4 + per_position) if token_classes else 4 * max_length + per_position
    return max(1, min(_MOST_ROWS, _TARGET_BYTES // row_bytes))


def kept_types(source: Source) -> dict[str, pa.DataType]:
    """The Arrow type of each column to keep, as Parquet gives it back.

    Raises:
        SourceError: two splits have another type for one column.
    """
    kept: dict[str, pa.DataType] = {}
    for split, rows in source.splits.items():
        for name in source.columns.keep:
            kind = rows.features.arrow_schema.field(name).type
            if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
                kind = pa.string()
            if kept.setdefault(name, kind) != kind:
                raise SourceError(
                    f"{source.name}: split {split}: column {name}: expected {kept[name]}, as in the splits before, found {kind}"
                )
    return kept


def full_row_is_too_large(task: Task, num_classes: int, max_length: int) -> bool:
    """Whether `full` is refused: a row of a language model's float16 logits would pass 64 MB."""
    return task.classes_are_tokens and 2 * num_classes * max_length > MAX_ROW_BYTES


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[tuple[list[int], int]]:
    """Group rows of similar length: (row numbers, padded length) of each forward pass.

    The longest come first, so that what does not fit in memory shows at once. Padded, a batch has at most `batch_tokens` tokens, or one row.
    """
    batches: list[tuple[list[int], int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1][0]) + 1) * batches[-1][1] <= batch_tokens:
            batches[-1][0].append(row)
        else:
            batches.append(([row], lengths[row]))
    return batches


def library_versions() -> dict[str, str]:
    """What must be equal for equal bytes."""
    found = {}
    for name in ("soft-label-pipeline", "torch", "transformers", "tokenizers", "pyarrow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
