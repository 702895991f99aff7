"""Rows of data sets that hold top log-probabilities already -> the entries beside their tokens. Four layouts, told apart by their columns.

| columns beside `input_ids` | layout |
|---|---|
| `compressed_logprobs`, `bytepacked_indices` | DistillKit's packed Parquet, with a compression configuration |
| `token_ids`, `top_values` | L lists of class ids and of their log-probabilities |
| `target_token_ids`, `logprobs` | the same |
| `logprobs` or `top_logprobs` | L lists of {logprob, token}; a token is an id or its text |

`labels`, where there are any, mark with -100 what is not to be learnt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerBase

from pipeline.capture import LabelledRow
from pipeline.errors import BadRowError, SourceError
from pipeline.records import NO_LABEL, SoftLabels, TeacherScores, TopK
from pipeline.sharing.distillkit import PackedLayout, unpack
from pipeline.sharing.responses import token_id
from pipeline.softlabels.ragged import offsets_of

_PACKED = ("compressed_logprobs", "bytepacked_indices")
_LEGACY = ("packed_indices", "exact_values", "coeffs")
_PAIRS = (("token_ids", "top_values"), ("target_token_ids", "logprobs"))
_LISTS = ("top_logprobs", "logprobs")

#: Rows of a Parquet file that are read at once.
_ROWS = 32


@dataclass(frozen=True, slots=True)
class TopEntries:
    """T tokens and L entries: entry j belongs to token j or to the one after it (see `import_responses`)."""

    input_ids: np.ndarray
    """(T,) int64."""
    ids: np.ndarray
    """(L, K) int64."""
    logprobs: np.ndarray
    """(L, K) float64, nats; -inf where there is none."""
    learnt: np.ndarray
    """(T,) bool: which tokens are to be learnt."""


def is_table(columns: Iterable[str]) -> bool:
    """Whether a row with these columns is in one of the layouts."""
    names = set(columns)
    return any(set(pair) <= names for pair in (_PACKED, _LEGACY, *_PAIRS)) or (
        "input_ids" in names and any(name in names for name in _LISTS)
    )


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, lists as Arrow arrays.

    Raises:
        SourceError: it cannot be read.
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
    """One row, whatever its layout.

    Raises:
        SourceError: none of the layouts, or parts that do not fit each other.
    """
    if row.get("input_ids") is None:
        raise SourceError(f"expected input_ids beside the log-probabilities, found {', '.join(sorted(row))}")
    tokens = _vector(row["input_ids"])
    learnt = np.ones(len(tokens), dtype=bool)
    if row.get("labels") is not None:
        learnt = _vector(row["labels"]) != NO_LABEL
    if _has(row, _LEGACY):
        raise SourceError(
            "the legacy layout of DistillKit (packed_indices, exact_values, coeffs) may hold logits up to a constant, so that the mass outside is not known; "
            "it is not read"
        )
    if _has(row, _PACKED):
        if layout is None:
            raise SourceError(
                "packed by DistillKit: give the file that says how, with --compression-config compression_config.yaml"
            )
        values, classes = (_matrix(row[name], fill=0).astype(np.uint8) for name in _PACKED)
        ids, logprobs = unpack(values, classes, layout)
        logprobs = logprobs - np.log(
            np.maximum(np.exp(logprobs).sum(-1, keepdims=True), 1.0)
        )  # a fit may pass a mass of 1
    else:
        ids, logprobs = _unpacked(row, tokenizer)
    if len(learnt) != len(tokens) or not len(tokens) - 1 <= len(logprobs) <= len(tokens) or ids.shape != logprobs.shape:
        raise SourceError(
            f"expected an entry for each of {len(tokens)} tokens, or for each but one, found {len(logprobs)} of log-probabilities and {len(ids)} of ids"
        )
    return TopEntries(tokens, ids, logprobs, learnt)


def shift_differences(entries: TopEntries) -> np.ndarray:
    """(M,): by how much the token at an entry's place weighs more in it than the token after that."""
    at = np.arange(1, min(len(entries.ids), len(entries.input_ids) - 1))
    weights = np.exp(entries.logprobs[at])
    here, after = ((weights * (entries.ids[at] == entries.input_ids[at + shift][:, None])).sum(-1) for shift in (0, 1))
    return np.asarray(here - after)


def labelled(
    entries: TopEntries, *, empty: bool, top_k: int, tokenizer: PreTrainedTokenizerBase, split: str
) -> LabelledRow:
    """The entries at the positions that made them; a position without an entry is not supervised.

    Raises:
        BadRowError: no position is left, or one that holds no distribution.
    """
    tokens = entries.input_ids
    position = np.arange(len(entries.ids)) - (1 if empty else 0)
    usable = (position >= 0) & (position < len(tokens) - 1) & np.isfinite(entries.logprobs).any(-1)
    usable[usable] &= entries.learnt[position[usable] + 1]
    if not usable.any():
        raise BadRowError("no position has log-probabilities")
    position = position[usable]
    order = np.argsort(-entries.logprobs[usable], axis=-1, kind="stable")
    ids = np.take_along_axis(entries.ids[usable], order, -1)
    logprobs = np.take_along_axis(entries.logprobs[usable], order, -1)
    following = tokens[position + 1]
    hit = ids == following[:, None]
    nll = np.where(hit.any(-1), -logprobs[np.arange(len(ids)), hit.argmax(-1)], np.nan)
    nll[np.isinf(nll)] = np.nan
    supervised = np.zeros(len(tokens), dtype=bool)
    supervised[position] = True
    text = str(tokenizer.decode(following.tolist(), skip_special_tokens=True))
    scores = TeacherScores(torch.from_numpy(nll).float(), torch.full((len(nll),), torch.nan))
    soft = _soft_labels(ids[:, :top_k], logprobs[:, :top_k], len(tokenizer), top_k, position)
    return LabelledRow(
        tokens, soft_labels=soft, scores=scores, supervised=supervised, text_bytes=len(text.encode()), split=split
    )


def _soft_labels(ids: np.ndarray, logprobs: np.ndarray, num_classes: int, k: int, position: np.ndarray) -> SoftLabels:
    """(N, K) classes by falling probability -> soft labels; the mass outside is 1 - sum(p), all that is known of it."""
    known = np.isfinite(logprobs)
    wrong = known & ((ids < 0) | (ids >= num_classes))
    apart = np.where(known, ids, -1 - np.arange(ids.shape[1]))  # what is missing is no class twice
    twice = (np.diff(np.sort(apart, -1), axis=-1) == 0).any(-1)
    mass = np.where(known, np.exp(logprobs), 0.0).sum(-1)
    for bad, what in (
        (wrong.any(-1), f"class ids of 0 to {num_classes - 1}, the tokenizer's"),
        (twice, "each class once"),
        (mass > 1.01, "log-probabilities of a mass of at most 1"),
    ):
        if bad.any():
            n = int(bad.argmax())
            raise BadRowError(
                f"position {position[n]}: expected {what}, found {ids[n][:8].tolist()}, mass {mass[n]:.3f}"
            )
    counts = torch.from_numpy(known.sum(-1))
    residual = torch.from_numpy(np.log(np.maximum(1 - mass, np.finfo(np.float64).tiny))).float()
    return SoftLabels(
        TopK(k, (1.0,)),
        num_classes,
        top_offsets=offsets_of(counts),
        top_ids=torch.from_numpy(ids[known]),
        top_logprobs=torch.from_numpy(logprobs[known]).float(),
        tail_offsets=torch.zeros(len(counts) + 1, dtype=torch.int64),
        tail_ids=torch.zeros(0, dtype=torch.int64),
        log_residuals=residual.masked_fill(torch.from_numpy(mass >= 1) | (counts == num_classes), -torch.inf).unsqueeze(
            -1
        ),
    )


def _unpacked(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """(L, K) ids and log-probabilities of the layouts that hold them as they are."""
    for id_name, value_name in _PAIRS:
        if _has(row, (id_name, value_name)):
            return _matrix(row[id_name], fill=0).astype(np.int64), _matrix(row[value_name], fill=-np.inf)
    name = next((name for name in _LISTS if row.get(name) is not None), None)
    if name is None:
        raise SourceError(
            f"expected compressed_logprobs and bytepacked_indices, token_ids and top_values, target_token_ids and logprobs, or logprobs, found {', '.join(sorted(row))}"
        )
    lists = row[name].to_pylist() if isinstance(row[name], pa.Array) else row[name]
    ids, values = [], []
    for entry in lists:
        ids.append([_id(item, tokenizer) for item in entry or ()])
        values.append([float(item["logprob"]) for item in entry or ()])
    return _matrix(ids, fill=0).astype(np.int64), _matrix(values, fill=-np.inf)


def _id(item: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
    token = item["token_id"] if item.get("token_id") is not None else item["token"]
    return token_id(token, tokenizer) if isinstance(token, str) else int(token)


def _has(row: Mapping[str, Any], names: Sequence[str]) -> bool:
    return all(row.get(name) is not None for name in names)


def _vector(values: Any) -> np.ndarray:
    array = values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else np.asarray(values)
    return np.asarray(array.astype(np.int64))


def _matrix(values: Any, *, fill: float) -> np.ndarray:
    """L lists -> (L, K) float64, or of their own type where all are of one length; shorter ones are filled up."""
    if isinstance(values, pa.Array):
        counts = values.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        flat = values.flatten().to_numpy(zero_copy_only=False)
    else:
        counts = np.asarray([len(value or ()) for value in values], dtype=np.int64)
        flat = np.asarray([item for value in values for item in value or ()])
    width = int(counts.max(initial=0))
    if (counts == width).all():
        return np.asarray(flat.reshape(len(counts), width))
    out = np.full((len(counts), width), fill, dtype=np.float64)
    out[np.arange(width) < counts[:, None]] = flat
    return out
