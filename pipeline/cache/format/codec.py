"""`pack` and `unpack`, side by side: rows of the cache <-> Arrow columns.

List columns hold the positions of a row one after another. `unpack(pack(rows))` is `rows`, up to the float16 of what is stored in it; the rows of a
`sampled` cache come back as they are, once they are narrow (`softlabels.narrow`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.records import CachedExample, Encoding, Full, Sampled, SoftLabels, TokenizedExample
from pipeline.softlabels import split_rows


def content_hash(example: TokenizedExample) -> int:
    """Identity by content: a 64-bit hash of the token ids and the label."""
    return hash_tokens(example.input_ids, example.label)


def hash_tokens(input_ids: np.ndarray, label: int | None) -> int:
    """`content_hash` of a row's parts."""
    digest = hashlib.blake2b(input_ids.astype("<i4", copy=False).tobytes(), digest_size=8)
    digest.update(str(label).encode())
    return int.from_bytes(digest.digest(), "little")


def pack(rows: Sequence[CachedExample], schema: pa.Schema) -> pa.Table:
    """Rows -> the columns of the schema."""
    return pa.table([_pack_column(rows, field) for field in schema], schema=schema)


def unpack(table: pa.Table, encoding: Encoding, num_classes: int) -> list[CachedExample]:
    """Columns -> rows. Tensors are views of one copy of each column."""
    columns = {name: _unpack_column(table.column(name)) for name in table.column_names if name not in _SOFT}
    kept = [name for name in table.column_names if name not in _READERS]
    soft = _unpack_soft(table, encoding, num_classes)
    return [_unpack_row(columns, i, kept, soft[i]) for i in range(table.num_rows)]


# -------------------------------------------------------------------------------------------------- rows -> columns


def _pack_column(rows: Sequence[CachedExample], field: pa.Field) -> pa.Array:
    read = _READERS.get(field.name)
    if read is None:
        return pa.array([row.example.kept.get(field.name) for row in rows], type=field.type)
    values = [read(row) for row in rows]
    if not pa.types.is_list(field.type):
        return pa.array(values, type=field.type)
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    flat = np.concatenate(values) if values else np.zeros(0)
    dtype = field.type.value_type.to_pandas_dtype()
    if dtype == np.float16:  # a log-probability below -65504 is a probability of 0 either way; -inf stays -inf
        lowest = np.finfo(np.float16).min
        flat = np.where(np.isneginf(flat), flat, np.maximum(flat, lowest))
    return pa.ListArray.from_arrays(offsets, pa.array(flat.astype(dtype), type=field.type.value_type), type=field.type)


def _logits(row: CachedExample) -> np.ndarray:
    """(N * V,), centred: the maximum of every position is 0."""
    logprobs = row.soft.top_logprobs.reshape(len(row.soft), row.soft.num_classes)
    return (logprobs - logprobs.amax(-1, keepdim=True)).flatten().numpy()


def _top_weights(row: CachedExample) -> np.ndarray:
    """(sum K,): the weights in whole numbers of 1/steps, which they are already where the row is narrow."""
    assert isinstance(row.soft.encoding, Sampled)
    weights: np.ndarray = (row.soft.top_logprobs.double().exp() * row.soft.encoding.steps).round().numpy()
    return weights


def _tail_gaps(row: CachedExample) -> np.ndarray:
    """(sum K,): of each position the first class, then from each to the next: small numbers, which take fewer bytes."""
    ids = row.soft.tail_ids.numpy()
    gaps = np.diff(ids, prepend=0)
    starts = _starts(row.soft.tail_offsets.numpy())
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


_READERS: dict[str, Callable[[CachedExample], Any]] = {
    "source_row": lambda row: row.example.source_row,
    "piece": lambda row: row.example.piece,
    "content_hash": lambda row: row.content_hash,
    "text": lambda row: row.example.text,
    "text_pair": lambda row: row.example.text_pair,
    "input_ids": lambda row: row.example.input_ids,
    "token_type_ids": lambda row: row.example.token_type_ids,
    "supervised": lambda row: row.example.supervised,
    "document_lengths": lambda row: row.example.document_lengths,
    "text_bytes": lambda row: row.example.text_bytes,
    "label": lambda row: row.example.label,
    "logits": _logits,
    "top_count": lambda row: row.soft.top_offsets.diff().numpy(),
    "top_ids": lambda row: row.soft.top_ids.numpy(),
    "top_logprobs": lambda row: row.soft.top_logprobs.numpy(),
    "top_weights": _top_weights,
    "tail_count": lambda row: row.soft.tail_offsets.diff().numpy(),
    "tail_gaps": _tail_gaps,
    "log_residuals": lambda row: row.soft.log_residuals.flatten().numpy(),
    "entropy": lambda row: None if row.entropy is None else row.entropy.numpy(),
    "teacher_nll_sum": lambda row: row.teacher_nll_sum,
    "teacher_entropy_sum": lambda row: row.teacher_entropy_sum,
}


#: Columns that the soft labels of a row are made of.
_SOFT = ("logits", "top_count", "top_ids", "top_logprobs", "top_weights", "tail_count", "tail_gaps", "log_residuals")


# -------------------------------------------------------------------------------------------------- columns -> rows


def _unpack_column(column: pa.ChunkedArray) -> Callable[[int], Any]:
    """A reader of row i: a NumPy slice for lists, a Python value otherwise."""
    array = column.combine_chunks()
    if not pa.types.is_list(array.type):
        values: list[Any] = array.to_pylist()
        return values.__getitem__
    flat, offsets = _flat(array)
    return lambda i: flat[offsets[i] : offsets[i + 1]]


def _flat(array: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Values of all rows one after another, as torch takes them, and (rows + 1,) offsets into them."""
    offsets = array.offsets.to_numpy()
    flat = array.values.to_numpy(zero_copy_only=False)
    if flat.dtype == np.float16:
        flat = flat.astype(np.float32)
    elif flat.dtype in (np.uint16, np.uint32):  # torch indexes with int64
        flat = flat.astype(np.int64)
    return (flat if flat.flags.writeable else flat.copy()), offsets


def _unpack_row(columns: dict[str, Callable[[int], Any]], i: int, kept: list[str], soft: SoftLabels) -> CachedExample:
    def read(name: str) -> Any:
        return columns[name](i) if name in columns else None

    example = TokenizedExample(
        source_row=read("source_row"),
        piece=read("piece"),
        input_ids=read("input_ids"),
        supervised=read("supervised"),
        token_type_ids=read("token_type_ids"),
        label=read("label"),
        text=read("text"),
        text_pair=read("text_pair"),
        document_lengths=read("document_lengths"),
        text_bytes=read("text_bytes") or 0,
        kept={name: read(name) for name in kept},
    )
    entropy = None if "entropy" not in columns else torch.from_numpy(read("entropy"))
    sums = read("teacher_nll_sum"), read("teacher_entropy_sum")
    return CachedExample(example, soft, *sums, read("content_hash"), entropy)


def _unpack_soft(table: pa.Table, encoding: Encoding, num_classes: int) -> list[SoftLabels]:
    """The soft labels of every row: decoded for all positions at once, and then cut into rows."""
    found = {name: _flat(table.column(name).combine_chunks()) for name in _SOFT if name in table.column_names}
    columns = {name: flat[offsets[0] : offsets[-1]] for name, (flat, offsets) in found.items()}
    if isinstance(encoding, Full):
        soft = _unpack_full(columns["logits"], num_classes)
        counts = np.diff(found["logits"][1]) // num_classes
    else:
        soft = _unpack_top(columns.__getitem__, encoding, num_classes)
        counts = np.diff(found["top_count"][1])
    return split_rows(soft, counts.tolist())


def _unpack_full(logits: np.ndarray, num_classes: int) -> SoftLabels:
    table = torch.from_numpy(logits).reshape(-1, num_classes)  # (N, V)
    count = len(table)
    return SoftLabels(
        Full(),
        num_classes,
        top_offsets=torch.arange(count + 1) * num_classes,
        top_ids=torch.arange(num_classes).repeat(count),
        top_logprobs=torch.log_softmax(table, -1).flatten(),
        tail_offsets=torch.zeros(count + 1, dtype=torch.int64),
        tail_ids=torch.zeros(0, dtype=torch.int64),
        log_residuals=torch.zeros(count, 0),
    )


def _unpack_top(read: Callable[[str], Any], encoding: Encoding, num_classes: int) -> SoftLabels:
    top_offsets = _offsets(read("top_count"))
    count = len(top_offsets) - 1
    if isinstance(encoding, Sampled):
        tail_offsets = _offsets(read("tail_count"))
        sample = torch.from_numpy(tail_ids(read("tail_gaps"), tail_offsets.numpy()))
        logprobs = (torch.from_numpy(read("top_weights")).double() / encoding.steps).log().float()
        residuals = torch.zeros(count, 0)
    else:
        tail_offsets, sample = torch.zeros(count + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        logprobs = torch.from_numpy(read("top_logprobs"))
        residuals = torch.from_numpy(read("log_residuals")).reshape(count, -1)
    return SoftLabels(
        encoding,
        num_classes,
        top_offsets=top_offsets,
        top_ids=torch.from_numpy(read("top_ids")),
        top_logprobs=logprobs,
        tail_offsets=tail_offsets,
        tail_ids=sample,
        log_residuals=residuals,
    )


def _offsets(counts: np.ndarray) -> torch.Tensor:
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return torch.from_numpy(offsets)
