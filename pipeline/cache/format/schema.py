"""The columns of a cache in format 1, in plain Parquet types only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline.errors import MisuseError
from pipeline.records import Encoding, Full, LabelSource, Sampled, Score

FORMAT_VERSION = 1

#: An encoded image, stored as `datasets.Image` stores it: the bytes of the file, and its name.
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

#: From this number of classes on, `logits` are float16 instead of float32: for a vocabulary,
#: float32 would double the bytes without a benefit.
_NARROW_FROM = 4096


def cache_schema(
    encoding: Encoding,
    num_classes: int,
    *,
    labels: LabelSource,
    marks_positions: bool,
    token_type_ids: bool = False,
    text: bool = False,
    text_pair: bool = False,
    messages: bool = False,
    images: bool = False,
    views: bool = False,
    image_files: bool = False,
    choices: bool = False,
    words: bool = False,
    groups: bool = False,
    documents: bool = False,
    entropy: bool = False,
    label_logprobs: bool = False,
    kept: Mapping[str, pa.DataType] | None = None,
) -> pa.Schema:
    """Return the Arrow schema of every shard of a cache.

    Args:
        labels: where hard labels come from. `row` adds the column `label`; `positions`, `hidden`
            and `target` add `position_labels`; `tokens` adds `text_bytes`, the size of the
            predicted text.
        marks_positions: add `supervised`, which marks the tokens that have soft labels. Without it,
            a row has one position, or one for each label name.
        images: rows are images instead of tokens.
        views: rows are parts of images.
        image_files: the cache stores path and hash of each image file, not its bytes.
        choices: store the texts of the choices. Their lengths in tokens are in `document_lengths`.
        documents: rows are packed from isolated documents.
        kept: name and type of the columns copied from the source.

    Raises:
        MisuseError: a kept column has the name of a column that this schema defines.
    """
    columns: dict[str, pa.DataType] = {"source_row": pa.int64(), "piece": pa.int32(), "content_hash": pa.uint64()}
    if text:
        columns["text"] = pa.string()
        if text_pair:
            columns["text_pair"] = pa.string()
    if choices:
        columns["choice_texts"] = pa.list_(pa.string())
    if messages:
        columns["messages"] = pa.string()
    if words:
        columns["position_words"] = pa.list_(pa.string())
    if images:
        columns["encoded_image"] = IMAGE
        columns["image_hash"] = pa.uint64()
        if image_files:
            columns["image_sha256"] = pa.string()
        if views:
            columns["image_view"] = pa.list_(pa.int32())
    else:
        columns["input_ids"] = pa.list_(pa.int32())
    if token_type_ids:
        columns["token_type_ids"] = pa.list_(pa.int32())
    if marks_positions:
        columns["supervised"] = pa.list_(pa.bool_())
    if labels == "tokens":
        columns["text_bytes"] = pa.int32()
    elif labels in ("positions", "hidden", "target"):
        columns["position_labels"] = pa.list_(pa.float32() if isinstance(encoding, Score) else pa.int32())
    if groups:
        columns["score_group"] = pa.int64()
    if documents:
        columns["document_lengths"] = pa.list_(pa.int32())
    if labels == "row":
        columns["label"] = pa.int32()
    columns.update(soft_columns(encoding, num_classes))
    columns["teacher_nll_sum"] = pa.float32()
    columns["teacher_entropy_sum"] = pa.float32()
    if entropy:
        columns["entropy"] = pa.list_(pa.float16())
    if label_logprobs:
        columns["label_logprobs"] = pa.list_(pa.float16())
    for name, kind in (kept or {}).items():
        if name in columns:
            raise MisuseError(f"--keep-column {name}: a cache has a column of this name already; rename the source's")
        columns[name] = kind
    return pa.schema(list(columns.items()))


def soft_columns(encoding: Encoding, num_classes: int) -> dict[str, pa.DataType]:
    """Return name and type of the columns that hold the soft labels."""
    if isinstance(encoding, Full):
        return {"logits": pa.list_(pa.float32() if num_classes < _NARROW_FROM else pa.float16())}
    if isinstance(encoding, Score):
        return {"teacher_scores": pa.list_(pa.float32())}
    ids = pa.list_(pa.uint16() if num_classes <= 1 << 16 else pa.uint32())
    counts = pa.list_(pa.uint16() if num_classes < 1 << 16 else pa.uint32())
    columns = {"top_count": counts, "top_ids": ids}
    if isinstance(encoding, Sampled):
        return {**columns, "top_weights": pa.list_(pa.uint16()), "tail_count": counts, "tail_gaps": ids}
    return {**columns, "top_logprobs": pa.list_(pa.float16()), "log_residuals": pa.list_(pa.float16())}


def parquet_settings(schema: pa.Schema) -> dict[str, Any]:
    """Return the arguments of `pyarrow.parquet.ParquetWriter` that control how columns are stored.

    Lists of integers use BYTE_STREAM_SPLIT: Parquet stores small integers as INT32, and zstd would
    spend bytes on their zeros. zstd level 16 makes these columns 5% smaller, at 3 us per position;
    level 9 makes them no smaller. Lists of floats use neither: DuckDB does not read
    BYTE_STREAM_SPLIT floats, and no level makes them smaller. Only columns from the source, whose
    values may repeat, are dictionary-encoded.
    """
    dictionary, planes, levels = [], {}, {}
    for field in schema:
        if pa.types.is_struct(field.type):  # images are compressed already
            levels.update({f"{field.name}.{inner.name}": 3 for inner in field.type})
            continue
        path = f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        levels[path] = 3
        if pa.types.is_list(field.type) and pa.types.is_integer(field.type.value_type):
            planes[path], levels[path] = "BYTE_STREAM_SPLIT", 16
        elif not pa.types.is_list(field.type) and field.name not in _OURS:
            dictionary.append(field.name)
        elif field.name == "position_words":
            dictionary.append(path)
    return {
        "compression": "zstd",
        "compression_level": levels,
        "use_dictionary": dictionary,
        "column_encoding": planes,
    }


_OURS = (
    "source_row",
    "piece",
    "content_hash",
    "image_hash",
    "score_group",
    "text_bytes",
    "label",
    "teacher_nll_sum",
    "teacher_entropy_sum",
)


def describe(schema: pa.Schema) -> dict[str, str]:
    """Return name -> type of each column, as the manifest stores them."""
    return {field.name: _type_name(field.type) for field in schema}


def _type_name(kind: pa.DataType) -> str:
    return f"list<{kind.value_type}>" if pa.types.is_list(kind) else str(kind)
