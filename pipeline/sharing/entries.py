"""Convert tokens with top log-probabilities, from servers or data sets, to rows of a cache.

Input that would yield wrong soft labels raises an error with the position: values that are not
log-probabilities, entries of other tokens, fewer classes than are to be stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pipeline.capture import LabelledRow
from pipeline.errors import BadRowError
from pipeline.records import Scalar, SoftLabels, TeacherScores, TopK
from pipeline.softlabels.outside import log_outside
from pipeline.softlabels.ragged import offsets_of
from pipeline.tasks.pieces import Vocabulary, read_vocabulary

#: Largest log-probability and largest mass that rounding can explain.
_POSITIVE, _MOST_MASS = 0.01, 1.01
#: Rows with a lower mean kept mass do not hold top log-probabilities of a language model.
_LEAST_MEAN_MASS = 0.01


@dataclass(frozen=True, slots=True)
class Served:
    """Properties of entries that only server responses have, not tables."""

    num_top: np.ndarray
    """(L,) int64: the number of most likely classes in an entry. The actual token may be an
    additional class."""
    own: np.ndarray
    """(L,) int64: the token that an entry belongs to, if its rank shows it; else -1."""


@dataclass(frozen=True, slots=True)
class TopEntries:
    """T tokens and L entries; entry j belongs to token j or j + 1 (see `import_responses`)."""

    input_ids: np.ndarray
    """(T,) int64."""
    ids: np.ndarray
    """(L, K) int64 class ids."""
    logprobs: np.ndarray
    """(L, K) float64, nats; -inf: no class."""
    learnt: np.ndarray
    """(T,) bool: tokens that are training targets."""
    blank: np.ndarray
    """(L,) bool: entries that are empty, but not null."""
    served: Served | None = None
    kept: Mapping[str, Scalar] = field(default_factory=dict)


def shift_differences(entries: TopEntries) -> np.ndarray:
    """(M,): per entry, the probability of the token at its place minus that of the next token."""
    at = np.arange(1, min(len(entries.ids), len(entries.input_ids) - 1))
    at = at[~np.isneginf(entries.logprobs[at]).all(-1)]
    weights = np.exp(np.minimum(np.nan_to_num(entries.logprobs[at], nan=-np.inf), 0.0))
    here, after = ((weights * (entries.ids[at] == entries.input_ids[at + shift][:, None])).sum(-1) for shift in (0, 1))
    return np.asarray(here - after)


def labelled(
    entries: TopEntries, *, empty: bool, top_k: int, tokenizer: PreTrainedTokenizerBase, split: str
) -> LabelledRow:
    """Assign entries to the positions that predict them; positions without one are unsupervised.

    Args:
        empty: whether entry j belongs to token j, not to token j + 1.

    Raises:
        BadRowError: no position has an entry, or an entry is not a distribution.
    """
    tokens = entries.input_ids
    outside = (tokens < 0) | (tokens >= len(tokenizer))
    if outside.any():
        at = int(outside.argmax())
        raise BadRowError(f"token {at}: expected ids of 0 to {len(tokenizer) - 1}, the tokenizer's, found {tokens[at]}")
    position = np.arange(len(entries.ids)) - (1 if empty else 0)
    inside = (position >= 0) & (position < len(tokens) - 1)
    inside[inside] &= entries.learnt[position[inside] + 1]
    usable = inside & ~np.isneginf(entries.logprobs).all(-1)
    if not usable.any():
        raise BadRowError("no position has log-probabilities")
    first, last = np.flatnonzero(usable)[[0, -1]]
    blank = np.flatnonzero(entries.blank & inside)
    for j in blank[(blank > first) & (blank < last)]:
        raise BadRowError(
            f"position {position[j]}: expected log-probabilities, found an empty entry between others; use null for unknown entries"
        )
    position = position[usable]
    order = np.argsort(-entries.logprobs[usable], axis=-1, kind="stable")
    ids = np.take_along_axis(entries.ids[usable], order, -1)
    logprobs = np.take_along_axis(entries.logprobs[usable], order, -1)
    following = tokens[position + 1]
    hit = (ids == following[:, None]) & ~np.isneginf(logprobs)
    _check_values(logprobs, position)
    if entries.served is not None:
        served = Served(entries.served.num_top[usable], entries.served.own[usable])
        _check_served(served, logprobs, following, hit, position, top_k)
    nll = np.where(hit.any(-1), -logprobs[np.arange(len(ids)), hit.argmax(-1)], np.nan)
    supervised = np.zeros(len(tokens), dtype=bool)
    supervised[position] = True
    scores = TeacherScores(torch.from_numpy(nll).float(), torch.full((len(nll),), torch.nan))
    soft = _soft_labels(ids[:, :top_k], logprobs[:, :top_k], len(tokenizer), top_k, position)
    return LabelledRow(
        tokens,
        soft_labels=soft,
        scores=scores,
        supervised=supervised,
        text_bytes=int(_vocabulary(tokenizer).bytes_of_ids(tokens)[position + 1].sum()),
        split=split,
        kept=entries.kept,
    )


@lru_cache(maxsize=1)
def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    return read_vocabulary(tokenizer)


def _check_values(logprobs: np.ndarray, position: np.ndarray) -> None:
    """Check that (N, K) log-probabilities are numbers of at most 0.

    Raises:
        BadRowError: a value is nan or too large.
    """
    wrong = np.isnan(logprobs) | (logprobs > _POSITIVE)
    if wrong.any():
        n = int(wrong.any(-1).argmax())
        found = float(logprobs[n][wrong[n]][0])
        why = "" if np.isnan(found) else "; are they logits (vLLM: --logprobs-mode raw_logprobs)?"
        raise BadRowError(f"position {position[n]}: expected log-probabilities of at most 0, found {found:.4g}{why}")


def _check_served(
    served: Served, logprobs: np.ndarray, following: np.ndarray, hit: np.ndarray, position: np.ndarray, top_k: int
) -> None:
    """Check that each entry has the actual next token and at least `top_k` most likely tokens.

    Raises:
        BadRowError: it does not.
    """
    counts = (~np.isneginf(logprobs)).sum(-1)
    alone = (counts == 1) & hit.any(-1) & (served.num_top == 0)
    if alone.any():
        raise BadRowError(
            f"position {position[alone.argmax()]}: the log-probability of the token itself is there alone (prompt_logprobs or logprobs of 0); "
            "ask the server for as many as --top-k"
        )
    other = (served.own >= 0) & (served.own != following)
    stray = other | ~hit.any(-1)
    if stray.any():
        n = int(stray.argmax())
        found = f"that of token {served.own[n]}" if other[n] else f"{counts[n]} others"
        raise BadRowError(
            f"position {position[n]}: expected the log-probability of token {following[n]}, which follows there, found {found}; "
            "the entries are of another text or of other positions (give the shift with --position-zero)"
        )
    few = served.num_top < top_k
    if few.any():
        n = int(few.argmax())
        raise BadRowError(
            f"position {position[n]}: expected {top_k} log-probabilities, found {served.num_top[n]}; set --top-k to what the server returned"
        )


def _soft_labels(ids: np.ndarray, logprobs: np.ndarray, num_classes: int, k: int, position: np.ndarray) -> SoftLabels:
    """Convert (N, K) classes, sorted by falling probability, to soft labels.

    The residual mass is 1 - sum(p), all that is known of the other classes.

    Raises:
        BadRowError: a position does not hold a distribution.
    """
    known = np.isfinite(logprobs)
    counts = known.sum(-1)
    wrong = known & ((ids < 0) | (ids >= num_classes))
    apart = np.where(known, ids, -1 - np.arange(ids.shape[1]))  # missing classes are no duplicates
    twice = (np.diff(np.sort(apart, -1), axis=-1) == 0).any(-1)
    mass = np.where(known, np.exp(logprobs), 0.0).sum(-1)
    # the K most likely of V classes have a mass of at least K/V; a mean below 1% is implausible
    low = mass < 0.9 * counts / num_classes
    low |= (mass == mass.min()) & (mass.mean() < _LEAST_MEAN_MASS)
    for bad, what, why in (
        (wrong.any(-1), f"class ids of 0 to {num_classes - 1}, the tokenizer's", ""),
        (twice, "each class once", ""),
        (mass > _MOST_MASS, "log-probabilities of a mass of at most 1", ""),
        (low, "log-probabilities of the most likely classes", " (near 0); are they logits?"),
    ):
        if bad.any():
            n = int(bad.argmax())
            raise BadRowError(
                f"position {position[n]}: expected {what}, found {ids[n][:8].tolist()}, mass {mass[n]:.3f}{why}"
            )
    least = np.where(known, logprobs, np.inf).min(-1)  # (N,)
    with np.errstate(divide="ignore"):  # no class outside the kept ones
        most = np.log(np.maximum(num_classes - counts, 0)) + least
    rounded = log_outside(mass, counts, num_classes, most)
    residual = np.where(mass < 1, np.log(np.maximum(1 - mass, np.finfo(np.float64).tiny)), rounded)
    residual = np.where(counts == num_classes, -np.inf, residual)
    return SoftLabels(
        TopK(k, (1.0,)),
        num_classes,
        top_offsets=offsets_of(torch.from_numpy(counts)),
        top_ids=torch.from_numpy(ids[known]),
        top_logprobs=torch.from_numpy(logprobs[known]).float(),
        tail_offsets=torch.zeros(len(counts) + 1, dtype=torch.int64),
        tail_ids=torch.zeros(0, dtype=torch.int64),
        log_residuals=torch.from_numpy(residual).float().unsqueeze(-1),
    )
