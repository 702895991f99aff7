"""Convert blocks of rows to and from Arrow columns, and soft labels to and from their columns.

All conversions are by column, never row by row. `rows.py` converts single rows to and from blocks.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipeline.cache.format.schema import soft_columns
from pipeline.errors import CacheError, IntegrityError
from pipeline.records import (
    NO_LABEL,
    Encoding,
    Full,
    Image,
    Ragged,
    RowBlock,
    Sampled,
    Score,
    SoftLabels,
    TokenBlock,
    TokenizedExample,
    offsets_of_counts,
)

#: List column of rows that are read in a student's tokens: for each position of the student, the
#: teacher's position that it is aligned with.
TEACHER_POSITION = "teacher_position"
#: Environment variable: the directory of the data sets whose images caches refer to by path.
IMAGES = "SOFTLABEL_IMAGES"
#: Optional column: the teacher's log-probability of each position's hard label.
LABEL_LOGPROBS = "label_logprobs"

_NONE = np.zeros(0, dtype=np.int32)
_SMALLEST_HALF = np.finfo(np.float16).min


def content_hash(example: TokenizedExample) -> int:
    """Return a row's identity: a 64-bit hash of its token ids, or its image, and its labels."""
    labels = example.label if example.labels is None else tuple(example.labels.tolist())
    if example.image is None:
        return hash_tokens(example.input_ids, labels)
    return hash_image(hashlib.sha256(example.image.data).hexdigest(), example.view, labels)


def hash_image(sha256: str, view: np.ndarray | None, label: int | tuple[int, ...] | None) -> int:
    """Return the `content_hash` of an image, from its parts.

    Args:
        sha256: SHA-256 of the encoded image, in hexadecimal.
        view: the part of the image that is used, as in `TokenizedExample`. None: the cache has no
            views.
    """
    digest = hashlib.blake2b(sha256.encode(), digest_size=8)
    digest.update(b"" if view is None else view.astype("<i4", copy=False).tobytes())
    digest.update(str(label).encode())
    return int.from_bytes(digest.digest(), "little")


def hash_tokens(input_ids: np.ndarray, label: int | tuple[int, ...] | None) -> int:
    """Return the `content_hash` of a row of tokens, from its parts."""
    digest = hashlib.blake2b(input_ids.astype("<i4", copy=False).tobytes(), digest_size=8)
    digest.update(str(label).encode())
    return int.from_bytes(digest.digest(), "little")


# -------------------------------------------------------------------------------- block <-> columns


def pack(block: RowBlock, schema: pa.Schema) -> pa.Table:
    """Convert a block to a table with the columns of the schema."""
    return pa.table([_pack_column(block, field) for field in schema], schema=schema)


def unpack(table: pa.Table, encoding: Encoding, num_classes: int) -> RowBlock:
    """Convert a table to a block; its arrays are views of Arrow's memory where types allow."""
    lists, numbers, others = {}, {}, {}
    for name in table.column_names:
        array = table.column(name).combine_chunks()
        if isinstance(array, pa.ChunkedArray):  # a column without rows
            array = pa.concat_arrays([pa.array([], type=array.type), *array.chunks])
        if name not in COLUMNS or _stays_arrow(array.type):
            others[name] = array
        elif pa.types.is_list(array.type):
            lists[name] = flat(array)
        else:
            full = pc.fill_null(array, NO_LABEL) if name == "label" else array
            numbers[name] = full.to_numpy(zero_copy_only=False)
    return RowBlock(encoding, num_classes, lists, numbers, others)


def _stays_arrow(kind: pa.DataType) -> bool:
    """Whether a column holds texts, lists of texts, or images."""
    return bool(pa.types.is_string(kind.value_type if pa.types.is_list(kind) else kind) or pa.types.is_struct(kind))


def _pack_column(block: RowBlock, field: pa.Field) -> pa.Array:
    if field.name in block.lists:
        column = block.lists[field.name]
        values = pa.array(column.values, type=field.type.value_type)
        return pa.ListArray.from_arrays(column.offsets.astype(np.int32), values, type=field.type)
    if field.name in block.numbers:
        numbers = block.numbers[field.name]
        return pa.array(numbers, type=field.type, mask=numbers == NO_LABEL if field.name == "label" else None)
    return block.others[field.name].cast(field.type)


def flat(array: pa.ListArray) -> Ragged:
    """Return the values of all rows in one array, with offsets that start at 0."""
    offsets = array.offsets.to_numpy()
    values = array.values[offsets[0] : offsets[-1]].to_numpy(zero_copy_only=False)
    return Ragged.of(values, np.diff(offsets))


# ---------------------------------------------------------------------------- soft labels <-> lists


def pack_soft(soft: SoftLabels, counts: np.ndarray) -> dict[str, Ragged]:
    """Convert the soft labels of R rows to the columns in which they are stored.

    Args:
        soft: soft labels of all rows, concatenated.
        counts: (R,) positions of each row.

    The round trip is exact for `sampled`, once `softlabels.narrow` was applied; for other encodings
    it is exact up to the rounding of the columns stored as float16.
    """
    types = soft_columns(soft.encoding, soft.num_classes)
    positions = offsets_of_counts(counts)
    columns: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # values, and the offsets of the rows
    if isinstance(soft.encoding, Full):
        logprobs = soft.top_logprobs.reshape(len(soft), soft.num_classes)
        # centred: the maximum is 0
        centred = (logprobs - logprobs.amax(-1, keepdim=True)) if len(soft) else logprobs
        columns["logits"] = centred.flatten().numpy(), positions * soft.num_classes
    elif isinstance(soft.encoding, Score):
        columns["teacher_scores"] = soft.top_logprobs.numpy(), positions
    else:
        top_offsets, tail_offsets = soft.top_offsets.numpy(), soft.tail_offsets.numpy()
        columns["top_count"] = np.diff(top_offsets), positions
        columns["top_ids"] = soft.top_ids.numpy(), top_offsets[positions]
        if isinstance(soft.encoding, Sampled):
            weights = (soft.top_logprobs.double().exp() * soft.encoding.steps).round().numpy()
            columns["top_weights"] = weights, top_offsets[positions]
            columns["tail_count"] = np.diff(tail_offsets), positions
            columns["tail_gaps"] = _tail_gaps(soft.tail_ids.numpy(), tail_offsets), tail_offsets[positions]
        else:
            columns["top_logprobs"] = soft.top_logprobs.numpy(), top_offsets[positions]
            grid = soft.log_residuals.shape[-1]
            columns["log_residuals"] = soft.log_residuals.flatten().numpy(), positions * grid
    return {
        name: Ragged(narrowed(values, types[name].value_type.to_pandas_dtype()), np.diff(offsets), offsets)
        for name, (values, offsets) in columns.items()
    }


def narrowed(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Cast values to the type in which they are stored."""
    if dtype == np.float16:  # clip to -65504 instead of overflowing to -inf; keep -inf
        values = np.where(np.isneginf(values), values, np.maximum(values, _SMALLEST_HALF))
    return values.astype(dtype)


def unpack_soft(block: RowBlock) -> SoftLabels:
    """Return the soft labels of all positions of a block, concatenated in row order."""
    encoding, lists = block.encoding, block.lists
    if isinstance(encoding, Full):
        return _unpack_full(_tensor(lists["logits"].values), block.num_classes)
    if isinstance(encoding, Score):
        scores = _tensor(lists["teacher_scores"].values)
        none, start = torch.zeros(0, dtype=torch.int64), torch.zeros(len(scores) + 1, dtype=torch.int64)
        ids, residuals = torch.zeros(len(scores), dtype=torch.int64), torch.zeros(len(scores), 0)
        return SoftLabels(encoding, 1, torch.arange(len(scores) + 1), ids, scores, start, none, residuals)
    top_offsets = torch.from_numpy(offsets_of_counts(lists["top_count"].values))
    count = len(top_offsets) - 1
    if isinstance(encoding, Sampled):
        offsets = offsets_of_counts(lists["tail_count"].values)
        tail_offsets, sample = torch.from_numpy(offsets), torch.from_numpy(tail_ids(lists["tail_gaps"].values, offsets))
        logprobs = (_tensor(lists["top_weights"].values).double() / encoding.steps).log().float()
        residuals = torch.zeros(count, 0)
    else:
        tail_offsets, sample = torch.zeros(count + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        logprobs = _tensor(lists["top_logprobs"].values)
        residuals = _tensor(lists["log_residuals"].values).reshape(count, -1)
    return SoftLabels(
        encoding,
        block.num_classes,
        top_offsets=top_offsets,
        top_ids=_tensor(lists["top_ids"].values),
        top_logprobs=logprobs,
        tail_offsets=tail_offsets,
        tail_ids=sample,
        log_residuals=residuals,
    )


def _unpack_full(logits: Tensor, num_classes: int) -> SoftLabels:
    table = logits.reshape(-1, num_classes)  # (N, V)
    count = len(table)
    return SoftLabels(
        Full(),
        num_classes,
        top_offsets=torch.arange(count + 1) * num_classes,
        top_ids=torch.arange(num_classes).expand(count, num_classes).flatten(),
        top_logprobs=torch.log_softmax(table, -1).flatten(),
        tail_offsets=torch.zeros(count + 1, dtype=torch.int64),
        tail_ids=torch.zeros(0, dtype=torch.int64),
        log_residuals=torch.zeros(count, 0),
    )


def _tail_gaps(ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Encode ascending class ids as (sum K,) differences, which compress better.

    The first value of each position is its first class id; the others are the differences to the
    class id before.
    """
    gaps = np.diff(ids, prepend=0)
    starts = _starts(offsets)
    gaps[starts] = ids[starts]
    return gaps


def tail_ids(gaps: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Convert (K,) gaps, with the (N + 1,) offsets of the positions, back to (K,) class ids."""
    sums = np.cumsum(gaps, dtype=np.int64)
    starts = _starts(offsets)
    counts = np.diff(offsets)
    ids: np.ndarray = sums - np.repeat(sums[starts] - gaps[starts], counts[counts > 0])
    return ids


def _starts(offsets: np.ndarray) -> np.ndarray:
    """Return the index of the first value of each position that has any."""
    starts: np.ndarray = offsets[:-1][np.diff(offsets) > 0]
    return starts


def _tensor(values: np.ndarray) -> Tensor:
    """Return the values as a tensor of float32, float64 or int64.

    Arrow's memory is read-only, so it is copied.
    """
    if values.dtype == np.float16:
        values = values.astype(np.float32)
    elif values.dtype in (np.uint16, np.uint32):  # torch indexes with int64
        values = values.astype(np.int64)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


# ---------------------------------------------------------------------------------- parts of blocks


def tokens_of(block: RowBlock) -> TokenBlock:
    """Return the columns of a block that a task collates."""
    lists: Mapping[str, Ragged] = block.lists
    images = block.others.get("encoded_image")
    return TokenBlock(
        lists["input_ids"] if images is None else Ragged.of(_NONE, np.zeros(len(block), dtype=np.int64)),
        supervised=lists.get("supervised"),
        token_type_ids=lists.get("token_type_ids"),
        document_lengths=lists.get("document_lengths"),
        label=None if "label" not in block.numbers else block.numbers["label"].astype(np.int64),
        labels=lists.get("position_labels"),
        images=None if images is None else images_of(block),
        views=lists.get("image_view"),
        num_classes=block.num_classes,
    )


def images_of(block: RowBlock) -> list[Image]:
    """Return the (R,) images of a block.

    Images that the block refers to by path are read from the directory in the environment variable
    `SOFTLABEL_IMAGES`, or from the current directory.

    Raises:
        CacheError: a file cannot be read.
        IntegrityError: a file is not the image that the teacher saw.
    """
    images: list[dict[str, Any]] = block.others["encoded_image"].to_pylist()
    if "image_sha256" not in block.others:
        return [Image(image["bytes"], image["path"]) for image in images]
    hashes: list[str] = block.others["image_sha256"].to_pylist()
    return [_read_image(image["path"], sha256) for image, sha256 in zip(images, hashes, strict=True)]


def _read_image(place: str, sha256: str) -> Image:
    path = Path(os.environ.get(IMAGES, ""), place)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise CacheError(
            f"{path}: {getattr(error, 'strerror', None) or error}; the cache stores paths of images, not the images: set {IMAGES} to the directory that holds {place.partition('/')[0]}"
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise IntegrityError(
            f"{path}: differs from the image that the teacher saw (expected sha256 {sha256[:12]}..., found {found[:12]}...); restore the original file"
        )
    return Image(data, place, place)


def image_hash(sha256: str) -> int:
    """Return the first 64 bits of a SHA-256 in hexadecimal, by which equal images are found."""
    return int(sha256[:16], 16)


def num_tokens_of(block: RowBlock) -> int:
    """Return the number of tokens of all rows; an image counts as one token."""
    ids = block.lists.get("input_ids")
    return len(block) if ids is None else int(ids.counts.sum())


def positions_of(block: RowBlock) -> np.ndarray:
    """Return the number of supervised positions of each row, (R,) integers.

    In rows that are read in a student's tokens, these are the student's positions.
    """
    found = block.lists.get(TEACHER_POSITION)
    return labelled_positions_of(block) if found is None else found.counts


def labelled_positions_of(block: RowBlock) -> np.ndarray:
    """Return the number of positions of each row that have soft labels, (R,) integers."""
    if isinstance(block.encoding, Full):
        return block.lists["logits"].counts // block.num_classes
    if isinstance(block.encoding, Score):
        return block.lists["teacher_scores"].counts
    return block.lists["top_count"].counts


def positions_in_rows(block: RowBlock) -> list[np.ndarray]:
    """Return, for each row, the token positions that are supervised.

    Without the column `supervised`, the positions are numbered from 0.
    """
    flags = block.lists.get("supervised")
    if flags is None:
        return [np.arange(count) for count in labelled_positions_of(block).tolist()]
    return [np.flatnonzero(flags.values[start:stop]) for start, stop in itertools.pairwise(flags.offsets.tolist())]


def text_bytes_of(block: RowBlock) -> np.ndarray:
    """Return the `text_bytes` of each row, (R,) int64; 0 if the task has none."""
    found = block.numbers.get("text_bytes")
    return np.zeros(len(block), dtype=np.int64) if found is None else found.astype(np.int64)


#: Columns that this project defines; all others are copied from the source.
COLUMNS = frozenset(
    [
        "source_row",
        "piece",
        "content_hash",
        "text",
        "text_pair",
        "messages",
        "encoded_image",
        "image_sha256",
        "image_hash",
        "image_view",
        "choice_texts",
        "position_words",
        "input_ids",
        "token_type_ids",
        "supervised",
        "document_lengths",
        "text_bytes",
        "label",
        "position_labels",
        "logits",
        "teacher_scores",
        "score_group",
        "top_count",
        "top_ids",
        "top_logprobs",
        "top_weights",
        "tail_count",
        "tail_gaps",
        "log_residuals",
        "entropy",
        "label_logprobs",
        "teacher_nll_sum",
        "teacher_entropy_sum",
    ]
)
