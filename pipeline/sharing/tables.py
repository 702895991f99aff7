"""Read rows of data sets with top log-probabilities.

Four layouts are distinguished by their columns.

| columns besides `input_ids` | layout |
|---|---|
| `compressed_logprobs`, `bytepacked_indices` | DistillKit's packed Parquet with configuration |
| `token_ids`, `top_values` | L lists of class ids and of their log-probabilities |
| `target_token_ids`, `logprobs` | the same |
| `logprobs` or `top_logprobs` | L lists of {logprob, token}; a token is an id or its text |

The optional column `labels` has -100 for tokens that are not training targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from pipeline.errors import BadRowError, SourceError
from pipeline.records import NO_LABEL
from pipeline.sharing.distillkit import PackedLayout, unpack
from pipeline.sharing.entries import TopEntries
from pipeline.sharing.responses import token_id

_PACKED = ("compressed_logprobs", "bytepacked_indices")
_LEGACY = ("packed_indices", "exact_values", "coeffs")
_PAIRS = (("token_ids", "top_values"), ("target_token_ids", "logprobs"))
_LISTS = ("top_logprobs", "logprobs")

#: Number of rows of a Parquet file that are read at once.
_ROWS = 32
#: Largest log-probability that a fit may yield.
_FIT_ABOVE_ZERO = 1.0


def is_table(columns: Iterable[str]) -> bool:
    """Whether a row with these columns has one of the layouts."""
    names = set(columns)
    return any(set(pair) <= names for pair in (_PACKED, _LEGACY, *_PAIRS)) or (
        "input_ids" in names and any(name in names for name in _LISTS)
    )


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file, with lists as Arrow arrays.

    Raises:
        SourceError: the file cannot be read.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, arrow_extensions_enabled=False) as file:
            wanted = {"input_ids", "labels", *_PACKED, *_LEGACY, *(n for pair in _PAIRS for n in pair), *_LISTS}
            names = [name for name in file.schema_arrow.names if name in wanted]
            for batch in file.iter_batches(_ROWS, columns=names):
                for i in range(batch.num_rows):
                    yield {name: batch.column(j)[i].values for j, name in enumerate(names)}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read as Parquet ({' '.join(str(error).split())[:200]})") from None


def read_entries(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, layout: PackedLayout | None) -> TopEntries:
    """Read one row in any of the layouts.

    Raises:
        SourceError: the row has none of the layouts, or its columns do not match.
    """
    if row.get("input_ids") is None:
        raise SourceError(f"expected input_ids beside the log-probabilities, found {', '.join(sorted(row))}")
    tokens = _vector("input_ids", row["input_ids"])
    learnt = np.ones(len(tokens), dtype=bool)
    if row.get("labels") is not None:
        learnt = _vector("labels", row["labels"]) != NO_LABEL
    if _has(row, _LEGACY):
        raise SourceError(
            "the legacy layout of DistillKit (packed_indices, exact_values, coeffs) may hold logits up to a constant, so that the mass outside is not known; "
            "it is not read"
        )
    if _has(row, _PACKED):
        if layout is None:
            raise SourceError(
                "packed by DistillKit: give its compression configuration, --compression-config compression_config.yaml"
            )
        values, classes = (_packed(name, row[name]) for name in _PACKED)
        ids, logprobs = unpack(values, classes, layout)
        _check_fit(logprobs)
        logprobs = logprobs - np.log(
            np.maximum(np.exp(logprobs).sum(-1, keepdims=True), 1.0)
        )  # the mass of a fit may exceed 1
        blank = np.zeros(len(ids), dtype=bool)
    else:
        ids, logprobs, blank = _unpacked(row, tokenizer)
    if len(learnt) != len(tokens) or not len(tokens) - 1 <= len(logprobs) <= len(tokens) or ids.shape != logprobs.shape:
        raise SourceError(
            f"expected an entry for each of {len(tokens)} tokens, or for each but one, found {len(logprobs)} of log-probabilities and {len(ids)} of ids"
        )
    return TopEntries(tokens, ids, logprobs, learnt, blank)


def _unpacked(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read a layout that is not packed.

    Returns:
        (L, K) class ids; (L, K) log-probabilities; (L,) bool, entries that are empty, not null.
    """
    for names in _PAIRS:
        if _has(row, names):
            (ids, counts), (values, others) = (
                _matrix(row[name], fill=fill) for name, fill in zip(names, (-1, -np.inf), strict=True)
            )
            if len(counts) == len(others) and (counts != others).any():
                j = int((counts != others).argmax())
                raise SourceError(
                    f"entry {j}: expected as many {names[0]} as {names[1]}, found {max(counts[j], 0)} and {max(others[j], 0)}"
                )
            return _whole(names[0], ids), values.astype(np.float64), counts == 0
    name = next((name for name in _LISTS if row.get(name) is not None), None)
    if name is None:
        raise SourceError(
            f"expected compressed_logprobs and bytepacked_indices, token_ids and top_values, target_token_ids and logprobs, or logprobs, found {', '.join(sorted(row))}"
        )
    lists = row[name].to_pylist() if isinstance(row[name], pa.Array) else row[name]
    pairs = [None if entry is None else [_pair(j, item, tokenizer) for item in entry] for j, entry in enumerate(lists)]
    ids, _ = _matrix([pair and [token for token, _ in pair] for pair in pairs], fill=-1)
    values, counts = _matrix([pair and [value for _, value in pair] for pair in pairs], fill=-np.inf)
    return _whole(name, ids), values.astype(np.float64), counts == 0


def _pair(j: int, item: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[int, float]:
    try:
        return _id(item, tokenizer), float(item["logprob"])
    except SourceError as error:
        raise SourceError(f"entry {j}: {error}") from None
    except (TypeError, ValueError, KeyError):
        raise SourceError(f"entry {j}: expected {{logprob, token}}, found {str(item)[:80]}") from None


def _id(item: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
    token = item["token_id"] if item.get("token_id") is not None else item["token"]
    return token_id(token, tokenizer) if isinstance(token, str) else int(token)


def _has(row: Mapping[str, Any], names: Sequence[str]) -> bool:
    return all(row.get(name) is not None for name in names)


def _vector(name: str, values: Any) -> np.ndarray:
    """Convert a column to (T,) int64."""
    array = values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else np.asarray(values)
    if array.ndim != 1:
        raise SourceError(f"{name}: expected a list of integers, found {array.ndim} dimensions")
    return _whole(name, array)


def _whole(name: str, array: np.ndarray) -> np.ndarray:
    """Convert an array to int64.

    Raises:
        SourceError: a value is not a whole number; names the place of the first.
    """
    if array.size == 0 or array.dtype.kind in "iu":
        return np.asarray(array.astype(np.int64))
    numbers = np.asarray(array.astype(np.float64))
    wrong = ~(np.isfinite(numbers) & (numbers == np.floor(numbers)) & (np.abs(numbers) < 2**53))
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise SourceError(f"{name}: entry {at[0]}: expected whole numbers, found {array[at]}")
    return numbers.astype(np.int64)


def _packed(name: str, values: Any) -> np.ndarray:
    """Convert a packed column to (L, B) uint8, the bytes of each position.

    Raises:
        SourceError: positions differ in length, or a value is not a byte.
    """
    matrix, counts = _matrix(values, fill=0)
    if len(counts) and (counts != counts[0]).any():
        j = int((counts != counts[0]).argmax())
        raise SourceError(f"{name}: entry {j}: expected {counts[0]} bytes, as in the first, found {max(counts[j], 0)}")
    whole = _whole(name, matrix)
    wrong = (whole < 0) | (whole > 255)
    if wrong.any():
        j, i = np.argwhere(wrong)[0]
        raise SourceError(f"{name}: entry {j}: expected bytes of 0 to 255, found {whole[j, i]}")
    return whole.astype(np.uint8)


def _check_fit(logprobs: np.ndarray) -> None:
    """Check (L, K) unpacked values; a fit may exceed 0 a little.

    Raises:
        BadRowError: a value is nan, or so large that it is a logit.
    """
    wrong = np.isnan(logprobs) | (logprobs > _FIT_ABOVE_ZERO)
    if wrong.any():
        j, i = np.argwhere(wrong)[0]
        raise BadRowError(
            f"entry {j}: expected packed log-probabilities of at most 0, found {logprobs[j, i]:.4g}; are they logits, or packed with other settings?"
        )


def _matrix(values: Any, *, fill: float) -> tuple[np.ndarray, np.ndarray]:
    """Convert L lists to an (L, K) array, padded with `fill`; nulls are filled too.

    Returns:
        The array, and (L,) the length of each list, -1 for null.
    """
    if isinstance(values, pa.Array):
        missing = values.is_null().to_numpy(zero_copy_only=False)
        lists = values.cast(pa.large_list(values.type.value_type))
        counts = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        inner = lists.flatten()
        if inner.null_count:
            inner = inner.cast(pa.float64()).fill_null(fill)
        flat = inner.to_numpy(zero_copy_only=False)
    else:
        missing = np.asarray([value is None for value in values], dtype=bool)
        counts = np.asarray([len(value or ()) for value in values], dtype=np.int64)
        flat = np.asarray([fill if item is None else item for value in values for item in value or ()])
    width = int(counts.max(initial=0))
    out = np.full((len(counts), width), fill, dtype=np.float64)
    if (counts == width).all():
        out = np.asarray(flat.reshape(len(counts), width))
    else:
        out[np.arange(width) < counts[:, None]] = flat
    return out, np.where(missing, -1, counts)
