"""The columns of a cache, format 1: plain Parquet types only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline.errors import MisuseError
from pipeline.records import Encoding, Full, LabelSource, Sampled, Score

FORMAT_VERSION = 1

#: An encoded image, as `datasets.Image` stores it: the bytes of the file, and its name.
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

#: From here on `logits` are float16: a classifier's few keep float32, a vocabulary's would be twice
#: the bytes for nothing.
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
    """The Arrow schema of every shard of a cache.

    Args:
        labels: where hard labels come from: `row` has the column `label`, `positions`, `hidden` and
            `target` have `position_labels`, `tokens` has `text_bytes` of what is predicted.
        marks_positions: a row says which of its tokens have soft labels, in `supervised`; else it
            has one position, or one for each label name.
        images: rows are images in place of tokens.
        views: rows are parts of images.
        choices: the texts to choose from are stored; their lengths in tokens are
            `document_lengths`.
        image_files: images are files elsewhere, of which the cache has place and hash.
        documents: rows are packed from isolated documents.
        kept: name and type of the columns copied from the source.

    Raises:
        MisuseError: a kept column has the name of one of ours.
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
    """The columns that hold the soft labels themselves."""
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
    """How Parquet stores the columns, as `pyarrow.parquet.ParquetWriter` takes it.

    Lists of integers go in byte planes: a small integer is an INT32 in Parquet, and zstd would pay
    for its zeros. Level 16 takes 5% off them, at 3 us a position; level 9 takes nothing off. Not
    floats, whose planes DuckDB does not read, and which no level makes smaller. Only what comes
    from the source, and may repeat, has a dictionary.
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
    """Name -> type of each column, as the manifest holds them."""
    return {field.name: _type_name(field.type) for field in schema}


def _type_name(kind: pa.DataType) -> str:
    return f"list<{kind.value_type}>" if pa.types.is_list(kind) else str(kind)
