"""Convert single rows to and from blocks of rows, and build blocks from rows of other blocks."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.cache.format.codec import (
    COLUMNS,
    image_hash,
    images_of,
    labelled_positions_of,
    narrowed,
    pack_soft,
    unpack_soft,
)
from pipeline.records import (
    NO_LABEL,
    CachedExample,
    Ragged,
    RowBlock,
    Segment,
    SoftLabels,
    TokenizedExample,
    offsets_of_counts,
)
from pipeline.softlabels import concatenate, split_rows


def block_of(rows: Sequence[CachedExample], schema: pa.Schema) -> RowBlock:
    """Convert rows to a block with the columns of a schema.

    There is at least one row, and all rows have the same encoding and number of classes V.
    """
    entropies = [row.entropy for row in rows if row.entropy is not None]
    logprobs = [row.label_logprobs for row in rows if row.label_logprobs is not None]
    return make_block(
        [row.example for row in rows],
        concatenate([row.soft for row in rows]),
        [row.teacher_nll_sum for row in rows],
        [row.teacher_entropy_sum for row in rows],
        [row.content_hash for row in rows],
        schema,
        entropy=torch.cat(entropies) if len(entropies) == len(rows) else None,
        label_logprobs=torch.cat(logprobs) if len(logprobs) == len(rows) else None,
        counts=[len(row.soft) for row in rows],
    )


def make_block(
    examples: Sequence[TokenizedExample],
    soft: SoftLabels,
    nll_sums: Sequence[float],
    entropy_sums: Sequence[float],
    hashes: Sequence[int],
    schema: pa.Schema,
    *,
    counts: Sequence[int],
    entropy: Tensor | None = None,
    label_logprobs: Tensor | None = None,
) -> RowBlock:
    """Build a block with the columns of a schema from R examples and their soft labels.

    Args:
        soft: soft labels of all rows, concatenated.
        nll_sums: (R,) nats.
        entropy_sums: (R,) nats.
        hashes: (R,) content hashes.
        counts: (R,) positions of each row.
        entropy: (N,) nats; stored if the schema has the column.
        label_logprobs: (N,) nats; stored if the schema has the column. Values above 0, from
            rounding, become 0.
    """
    positions = np.asarray(counts)
    lists = pack_soft(soft, positions)
    numbers: dict[str, np.ndarray] = {}
    others: dict[str, pa.Array] = {}
    if entropy is not None and "entropy" in schema.names:
        lists["entropy"] = Ragged.of(narrowed(entropy.numpy(), np.float16), positions)
    if label_logprobs is not None and "label_logprobs" in schema.names:
        lists["label_logprobs"] = Ragged.of(narrowed(label_logprobs.clamp(max=0).numpy(), np.float16), positions)
    sums = {"teacher_nll_sum": nll_sums, "teacher_entropy_sum": entropy_sums, "content_hash": hashes}
    for field in schema:
        name = field.name
        if name in lists:
            continue
        if name not in COLUMNS:
            others[name] = pa.array([example.kept.get(name) for example in examples], type=field.type)
            continue
        values: Any = sums[name] if name in sums else [_READERS[name](example) for example in examples]
        if name == "encoded_image":
            refers = "image_sha256" in schema.names
            stored = [(None, each.file) if refers else (each.data, each.path) for each in values]
            others[name] = pa.array([{"bytes": data, "path": path} for data, path in stored], type=field.type)
        elif name in ("position_words", "choice_texts"):
            others[name] = pa.array([list(each) for each in values], type=field.type)
        elif pa.types.is_list(field.type):
            lists[name] = _ragged(values, field.type.value_type.to_pandas_dtype())
        elif pa.types.is_string(field.type):
            others[name] = pa.array(values, type=field.type)
        else:
            numbers[name] = np.array(values, dtype=field.type.to_pandas_dtype())
    return RowBlock(soft.encoding, soft.num_classes, lists, numbers, others)


def _ragged(values: Sequence[np.ndarray], dtype: Any) -> Ragged:
    return Ragged.of(np.concatenate(values).astype(dtype), np.array([len(each) for each in values]))


_READERS: dict[str, Callable[[TokenizedExample], Any]] = {
    "source_row": lambda example: example.source_row,
    "piece": lambda example: example.piece,
    "text": lambda example: example.text,
    "text_pair": lambda example: example.text_pair,
    "messages": lambda example: example.messages,
    "encoded_image": lambda example: example.image,
    "image_sha256": lambda example: None if example.image is None else hashlib.sha256(example.image.data).hexdigest(),
    "choice_texts": lambda example: example.choices,
    "image_hash": lambda example: (
        0 if example.image is None else image_hash(hashlib.sha256(example.image.data).hexdigest())
    ),
    "image_view": lambda example: example.view,
    "input_ids": lambda example: example.input_ids,
    "token_type_ids": lambda example: example.token_type_ids,
    "supervised": lambda example: example.supervised,
    "document_lengths": lambda example: example.document_lengths,
    "text_bytes": lambda example: example.text_bytes,
    "label": lambda example: NO_LABEL if example.label is None else example.label,
    "position_labels": lambda example: example.labels,
    "position_words": lambda example: example.words,
    "score_group": lambda example: example.group,
}


def rows_of(block: RowBlock) -> list[CachedExample]:
    """Convert a block to its rows. Their tensors are views of one copy of each column."""
    soft = split_rows(unpack_soft(block), labelled_positions_of(block).tolist())
    numbers: dict[str, list[Any]] = {name: values.tolist() for name, values in block.numbers.items()}
    images = images_of(block) if "encoded_image" in block.others else None
    others: dict[str, list[Any]] = {
        name: values.to_pylist() for name, values in block.others.items() if name != "encoded_image"
    }
    lists = {name: _parts(column) for name, column in block.lists.items() if name in _LISTS}
    none = [None] * len(block)
    kept = [name for name in block.others if name not in COLUMNS]
    return [
        CachedExample(
            TokenizedExample(
                source_row=numbers["source_row"][i],
                piece=numbers["piece"][i],
                input_ids=lists["input_ids"][i] if "input_ids" in lists else _NO_TOKENS,
                supervised=lists.get("supervised", none)[i],
                token_type_ids=lists.get("token_type_ids", none)[i],
                label=_label(numbers.get("label", none)[i]),
                labels=lists.get("position_labels", none)[i],
                group=numbers.get("score_group", none)[i],
                words=_words(others.get("position_words", none)[i]),
                text=others.get("text", none)[i],
                text_pair=others.get("text_pair", none)[i],
                messages=others.get("messages", none)[i],
                image=None if images is None else images[i],
                view=lists.get("image_view", none)[i],
                choices=_words(others.get("choice_texts", none)[i]),
                document_lengths=lists.get("document_lengths", none)[i],
                text_bytes=numbers.get("text_bytes", none)[i] or 0,
                kept={name: others[name][i] for name in kept},
            ),
            soft[i],
            numbers["teacher_nll_sum"][i],
            numbers["teacher_entropy_sum"][i],
            numbers["content_hash"][i],
            _floats(lists, "entropy", i),
            _floats(lists, "label_logprobs", i),
        )
        for i in range(len(block))
    ]


_LISTS = (
    "input_ids",
    "token_type_ids",
    "supervised",
    "position_labels",
    "document_lengths",
    "image_view",
    "entropy",
    "label_logprobs",
)
_NO_TOKENS = np.zeros(0, dtype=np.int32)
#: Columns that a cache of a task may or may not have, depending on the options of `cache-logits`.
_OPTIONAL = frozenset({"entropy", "label_logprobs", "text", "text_pair", "messages", "position_words", "choice_texts"})


def _floats(lists: Mapping[str, list[np.ndarray]], name: str, row: int) -> Tensor | None:
    """Return the list of one row as float32, or None if there is no such column."""
    return torch.from_numpy(lists[name][row].astype(np.float32)) if name in lists else None


def _parts(column: Ragged) -> list[np.ndarray]:
    """Split a column into the list of each row. Arrow's memory is read-only, so it is copied."""
    values = column.values if column.values.flags.writeable else column.values.copy()
    offsets = column.offsets.tolist()
    return [values[start:stop] for start, stop in itertools.pairwise(offsets)]


def _words(words: list[str] | None) -> tuple[str, ...] | None:
    return None if words is None else tuple(words)


def _label(label: int | None) -> int | None:
    return None if label == NO_LABEL else label


def gather(segments: Sequence[Segment], *, names: Container[str] | None = None) -> RowBlock:
    """Concatenate segments of blocks of one cache, or of caches with one encoding, into one block.

    Args:
        segments: at least one.
        names: the columns to keep. None: all. An optional column, such as `entropy`, is dropped if
            one of the blocks lacks it.
    """
    first = segments[0][0]
    if len(segments) == 1 and segments[0][2] - segments[0][1] == len(first):
        return first

    def wanted(columns: Iterable[str]) -> list[str]:
        found = [name for name in columns if names is None or name in names]
        return [name for name in found if name not in _OPTIONAL or all(map(partial(_has, name), segments))]

    return RowBlock(
        first.encoding,
        first.num_classes,
        {
            name: _gather([(block.lists[name], start, stop) for block, start, stop in segments])
            for name in wanted(first.lists)
        },
        {
            name: np.concatenate([block.numbers[name][start:stop] for block, start, stop in segments])
            for name in wanted(first.numbers)
        },
        {
            name: pa.concat_arrays([block.others[name][start:stop] for block, start, stop in segments])
            for name in wanted(first.others)
        },
    )


def _has(name: str, segment: Segment) -> bool:
    block = segment[0]
    return name in block.lists or name in block.others


def _gather(parts: Sequence[tuple[Ragged, int, int]]) -> Ragged:
    counts = np.concatenate([column.counts[start:stop] for column, start, stop in parts])
    values = [column.values[column.offsets[start] : column.offsets[stop]] for column, start, stop in parts]
    return Ragged.of(np.concatenate(values), counts)


def in_order(blocks: Sequence[RowBlock], numbers: Sequence[int]) -> RowBlock:
    """Return the rows of all blocks (at least one), sorted by number.

    Args:
        numbers: the number of each row, concatenated over the blocks.
    """
    return _take(gather([(block, 0, len(block)) for block in blocks]), np.argsort(numbers))


def _take(block: RowBlock, rows: np.ndarray) -> RowBlock:
    return RowBlock(
        block.encoding,
        block.num_classes,
        {name: _take_lists(column, rows) for name, column in block.lists.items()},
        {name: values[rows] for name, values in block.numbers.items()},
        {name: values.take(pa.array(rows)) for name, values in block.others.items()},
    )


def _take_lists(column: Ragged, rows: np.ndarray) -> Ragged:
    counts = column.counts[rows]
    offsets = offsets_of_counts(counts)
    places = np.arange(offsets[-1]) + np.repeat(column.offsets[rows] - offsets[:-1], counts)
    return Ragged(column.values[places], counts, offsets)
