"""`pack` and `unpack`, side by side: the columns of several rows as NumPy arrays <-> Arrow columns; and their soft labels <-> the columns that hold them.

Nothing is done row by row. `rows.py` makes blocks of rows, and rows of blocks.
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

#: Of rows that are read in the tokens of a student: which of the teacher's positions each of its
#: own is aligned with.
TEACHER_POSITION = "teacher_position"
#: Environment variable: the directory that holds the data sets whose images caches refer to.
IMAGES = "SOFTLABEL_IMAGES"
#: The teacher's log-probability of each position's hard label, where it was stored.
LABEL_LOGPROBS = "label_logprobs"

_NONE = np.zeros(0, dtype=np.int32)
_SMALLEST_HALF = np.finfo(np.float16).min


def content_hash(example: TokenizedExample) -> int:
    """Identity by content: a 64-bit hash of the token ids and the labels."""
    labels = example.label if example.labels is None else tuple(example.labels.tolist())
    if example.image is None:
        return hash_tokens(example.input_ids, labels)
    return hash_image(hashlib.sha256(example.image.data).hexdigest(), example.view, labels)


def hash_image(sha256: str, view: np.ndarray | None, label: int | tuple[int, ...] | None) -> int:
    """`content_hash` of an image's parts.

    Args:
        sha256: of the encoded image, in hexadecimal digits.
        view: the part that is seen; None: no row is a part.
    """
    digest = hashlib.blake2b(sha256.encode(), digest_size=8)
    digest.update(b"" if view is None else view.astype("<i4", copy=False).tobytes())
    digest.update(str(label).encode())
    return int.from_bytes(digest.digest(), "little")


def hash_tokens(input_ids: np.ndarray, label: int | tuple[int, ...] | None) -> int:
    """`content_hash` of a row's parts."""
    digest = hashlib.blake2b(input_ids.astype("<i4", copy=False).tobytes(), digest_size=8)
    digest.update(str(label).encode())
    return int.from_bytes(digest.digest(), "little")


# ------------------------------------------------------------------------------------------------- block <-> columns


def pack(block: RowBlock, schema: pa.Schema) -> pa.Table:
    """A block -> the columns of the schema."""
    return pa.table([_pack_column(block, field) for field in schema], schema=schema)


def unpack(table: pa.Table, encoding: Encoding, num_classes: int) -> RowBlock:
    """Columns -> a block, whose arrays are views of Arrow's memory wherever types allow."""
    lists, numbers, others = {}, {}, {}
    for name in table.column_names:
        array = table.column(name).combine_chunks()
        if isinstance(array, pa.ChunkedArray):  # of no rows
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
    """Whether a column is of texts, of lists of them, or of images."""
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
    """Values of all rows one after another, and offsets into them that start at 0."""
    offsets = array.offsets.to_numpy()
    values = array.values[offsets[0] : offsets[-1]].to_numpy(zero_copy_only=False)
    return Ragged.of(values, np.diff(offsets))


# --------------------------------------------------------------------------------------------- soft labels <-> lists


def pack_soft(soft: SoftLabels, counts: np.ndarray) -> dict[str, Ragged]:
    """Soft labels of all rows one after another -> their columns, as they are stored.

    Args:
        counts: (R,) positions of each row.

    The rows of `sampled` come back as they are, once they are narrow (`softlabels.narrow`); the
    others up to the float16 of what is stored in it.
    """
    types = soft_columns(soft.encoding, soft.num_classes)
    positions = offsets_of_counts(counts)
    columns: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # values, and where each row's begin
    if isinstance(soft.encoding, Full):
        logprobs = soft.top_logprobs.reshape(len(soft), soft.num_classes)
        centred = (logprobs - logprobs.amax(-1, keepdim=True)) if len(soft) else logprobs  # the maximum is 0
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
    """The values in the type that they are stored in."""
    if dtype == np.float16:  # a log-probability below -65504 is a probability of 0 either way; -inf stays -inf
        values = np.where(np.isneginf(values), values, np.maximum(values, _SMALLEST_HALF))
    return values.astype(dtype)


def unpack_soft(block: RowBlock) -> SoftLabels:
    """The soft labels of all positions of a block, one row after another."""
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
    """(sum K,): of each position the first class, then from each to the next: small numbers, which take fewer bytes."""
    gaps = np.diff(ids, prepend=0)
    starts = _starts(offsets)
    gaps[starts] = ids[starts]
    return gaps


def tail_ids(gaps: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(K,) gaps, (N + 1,) offsets of the positions -> (K,) classes: the inverse of `_tail_gaps`."""
    sums = np.cumsum(gaps, dtype=np.int64)
    starts = _starts(offsets)
    counts = np.diff(offsets)
    ids: np.ndarray = sums - np.repeat(sums[starts] - gaps[starts], counts[counts > 0])
    return ids


def _starts(offsets: np.ndarray) -> np.ndarray:
    """Where the first class stands of each position that has any."""
    starts: np.ndarray = offsets[:-1][np.diff(offsets) > 0]
    return starts


def _tensor(values: np.ndarray) -> Tensor:
    """Numbers as torch computes with them: float32 or float64, int64.

    Arrow's own memory is read-only, and is copied.
    """
    if values.dtype == np.float16:
        values = values.astype(np.float32)
    elif values.dtype in (np.uint16, np.uint32):  # torch indexes with int64
        values = values.astype(np.int64)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


# ----------------------------------------------------------------------------------------------------- parts of blocks


def tokens_of(block: RowBlock) -> TokenBlock:
    """What a task collates."""
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
    """(R,) images; those that the block refers to are read from their files, in the directory `SOFTLABEL_IMAGES` or the current one.

    Raises:
        CacheError: a file is not there.
        IntegrityError: it is another image than the teacher saw.
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
            f"{path}: {getattr(error, 'strerror', None) or error}; the cache refers to images by path and holds none: set {IMAGES} to the directory that holds {place.partition('/')[0]}"
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise IntegrityError(
            f"{path}: is another image than the one that the teacher saw (expected sha256 {sha256[:12]}..., found {found[:12]}...); put the original back"
        )
    return Image(data, place, place)


def image_hash(sha256: str) -> int:
    """64 bits of a SHA-256 in hexadecimal digits: by which equal images are told."""
    return int(sha256[:16], 16)


def num_tokens_of(block: RowBlock) -> int:
    """Tokens of all rows; an image is one."""
    ids = block.lists.get("input_ids")
    return len(block) if ids is None else int(ids.counts.sum())


def positions_of(block: RowBlock) -> np.ndarray:
    """(R,) integers: the supervised positions of each row; of a row in a student's tokens, those of the student."""
    found = block.lists.get(TEACHER_POSITION)
    return labelled_positions_of(block) if found is None else found.counts


def labelled_positions_of(block: RowBlock) -> np.ndarray:
    """(R,) integers: the positions of each row that the teacher has labelled, which the soft labels are of."""
    if isinstance(block.encoding, Full):
        return block.lists["logits"].counts // block.num_classes
    if isinstance(block.encoding, Score):
        return block.lists["teacher_scores"].counts
    return block.lists["top_count"].counts


def positions_in_rows(block: RowBlock) -> list[np.ndarray]:
    """Of each row the supervised positions among its tokens; without such a column they are numbered from 0."""
    flags = block.lists.get("supervised")
    if flags is None:
        return [np.arange(count) for count in labelled_positions_of(block).tolist()]
    return [np.flatnonzero(flags.values[start:stop]) for start, stop in itertools.pairwise(flags.offsets.tolist())]


def text_bytes_of(block: RowBlock) -> np.ndarray:
    """(R,) int64; 0 where the task has none."""
    found = block.numbers.get("text_bytes")
    return np.zeros(len(block), dtype=np.int64) if found is None else found.astype(np.int64)


#: The columns of ours; others come from the source.
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
