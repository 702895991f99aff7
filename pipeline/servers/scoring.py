"""Top log-probabilities at positions of a prompt, from vLLM and SGLang.

Prompts are sent as token ids, never as text. Every answer is checked for the sent ids, for each
position, and for K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.servers.answers import UnusableAnswerError
from pipeline.servers.described import Api

#: Positions per request to SGLang. Longer prompts are split; `logprob_start_len` is the beginning
#: of each part.
_POSITIONS = 2048
#: vLLM writes -9999 for a probability of 0.
_ZERO = -9000.0
#: Tolerances for rounding: the largest log-probability, and the largest mass.
_POSITIVE, _MOST_MASS = 0.01, 1.01


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """Predictions at P positions of a prompt."""

    ids: np.ndarray
    """(P, K) int64, by descending log-probability."""
    logprobs: np.ndarray
    """(P, K) float64, nats; -inf for a probability of 0."""
    own: np.ndarray
    """(P,) float64, nats: log-probability of the next token, which may not be among the K."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request, and the function that reads its answer."""

    path: str
    body: Mapping[str, Any]
    read: Callable[[Any], TopLogprobs]
    size: int
    """Number of tokens of the prompt."""


def requests_for(
    api: Api, model: str, ids: Sequence[int], positions: np.ndarray, k: int, rows: int | None = None
) -> list[Request]:
    """Build the requests for predictions at some positions of one prompt.

    SGLang gets several requests if there are many positions.

    Args:
        ids: the prompt.
        positions: (P,) int64, ascending, each below `len(ids) - 1`.
        k: number of classes per position.
        rows: number of classes of the model, including padding; None: unknown.
    """
    if api == "vllm":
        return [_vllm(model, ids[: int(positions[-1]) + 2], positions, k, rows)]
    starts = np.searchsorted(positions, np.arange(positions[0], positions[-1] + 1, _POSITIONS))
    parts = [part for part in np.split(positions, starts[1:]) if len(part)]
    return [_sglang(ids[: int(part[-1]) + 2], part, k, rows) for part in parts]


def _vllm(model: str, ids: Sequence[int], positions: np.ndarray, k: int, rows: int | None) -> Request:
    body = {
        "model": model,
        "prompt": list(ids),
        "max_tokens": 1,
        "temperature": 1.0,
        "prompt_logprobs": k,
        "return_token_ids": True,
    }

    following = np.asarray(ids, dtype=np.int64)[positions + 1]

    def read(answer: Any) -> TopLogprobs:
        choice = _first(_member(answer, "choices", list))
        entries = _member(choice, "prompt_logprobs", list)
        _expect_count(len(entries), len(ids))
        given = choice.get("prompt_token_ids") or answer.get("prompt_token_ids")
        if given is not None and list(given) != list(ids):
            raise UnusableAnswerError("expected an answer for the token ids that were sent, found one for others")
        tops = [entries[p + 1] for p in positions]
        for p, row in zip(positions, tops, strict=True):
            if not isinstance(row, dict):
                raise UnusableAnswerError(f"position {p}: expected log-probabilities, found {row!r}")
        counts = np.array([len(row) for row in tops])
        tokens = np.array([int(token) for row in tops for token in row], dtype=np.int64)
        # null becomes nan
        values = np.array([_value(each) for row in tops for each in row.values()], dtype=np.float64)
        is_own = tokens == np.repeat(following, counts)
        missing = np.add.reduceat(is_own, np.cumsum(counts) - counts) != 1
        if missing.any():
            n = int(missing.argmax())
            raise UnusableAnswerError(
                f"position {positions[n]}: expected the log-probability of token {following[n]}, which follows there, found those of others"
            )
        # The next token is an additional entry if it is not among the most likely ones.
        counts_top = counts - (counts == k + 1)
        in_top = ~(is_own & np.repeat(counts == k + 1, counts))
        return _table(tokens[in_top], values[in_top], counts_top, values[is_own], positions, k, rows)

    return Request("/v1/completions", body, read, len(ids))


def _sglang(ids: Sequence[int], positions: np.ndarray, k: int, rows: int | None) -> Request:
    start = int(positions[0])
    body = {
        "input_ids": list(ids),
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": start,
        "top_logprobs_num": k,
        "return_text_in_logprobs": False,
    }

    def read(answer: Any) -> TopLogprobs:
        about = _member(answer, "meta_info", dict)
        tokens = _member(about, "input_token_logprobs", list)
        entries = _member(about, "input_top_logprobs", list)
        _expect_count(about.get("prompt_tokens", len(ids)), len(ids))
        _expect_count(len(tokens), len(ids) - start)
        _expect_count(len(entries), len(ids) - start)
        for p in positions:
            token, entry = tokens[p + 1 - start], entries[p + 1 - start]
            # SGLang writes 0 for the last id of its vocabulary
            if not isinstance(token, list) or token[1] not in (ids[p + 1], 0):
                raise UnusableAnswerError(
                    f"position {p}: expected the log-probability of token {ids[p + 1]}, which follows there, found {str(token)[:60]}"
                )
            if not isinstance(entry, list):
                raise UnusableAnswerError(f"position {p}: expected log-probabilities, found {entry!r}")
        tops = [entries[p + 1 - start] for p in positions]
        return _table(
            np.array([int(each[1]) for top in tops for each in top], dtype=np.int64),
            np.array([each[0] for top in tops for each in top], dtype=np.float64),  # null: nan
            np.array([len(top) for top in tops]),
            np.array([tokens[p + 1 - start][0] for p in positions], dtype=np.float64),
            positions,
            k,
            rows,
        )

    return Request("/generate", body, read, len(ids))


def _value(entry: Any) -> Any:
    return entry.get("logprob") if isinstance(entry, dict) else entry


def _member(answer: Any, name: str, kind: type) -> Any:
    found = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(found, kind):
        has = ", ".join(sorted(map(str, answer))[:8]) if isinstance(answer, dict) else type(answer).__name__
        raise UnusableAnswerError(f"expected {name}, found {has}")
    return found


def _first(items: Sequence[Any]) -> Any:
    if len(items) != 1:
        raise UnusableAnswerError(f"expected one choice, found {len(items)}")
    return items[0]


def _expect_count(found: int, expected: int) -> None:
    if found != expected:
        raise UnusableAnswerError(f"expected log-probabilities of {expected} tokens, found {found}")


def _table(
    tokens: np.ndarray,
    values: np.ndarray,
    counts: np.ndarray,
    own: np.ndarray,
    positions: np.ndarray,
    k: int,
    classes: int | None = None,
) -> TopLogprobs:
    """Reshape consecutive entries of P positions to (P, K), by descending log-probability, then id.

    Raises:
        UnusableAnswerError: a wrong number of entries, invalid log-probabilities, or a duplicate
            class.
    """
    few = counts != k
    if few.any():
        n = int(few.argmax())
        raise UnusableAnswerError(f"position {positions[n]}: expected {k} log-probabilities, found {counts[n]}")
    ids, values = tokens.reshape(-1, k), values.reshape(-1, k)
    wrong = np.isnan(values).any(-1) | np.isnan(own) | (values > _POSITIVE).any(-1) | (own > _POSITIVE)
    wrong |= np.exp(np.minimum(values, 1.0)).sum(-1) > _MOST_MASS
    if classes is not None:  # the most likely of V classes has 1/V or more
        wrong |= values.max(-1) < -np.log(classes) - _POSITIVE
    if wrong.any():
        n = int(wrong.argmax())
        shown = [None if np.isnan(value) else round(float(value), 3) for value in values[n][:4]]
        raise UnusableAnswerError(
            f"position {positions[n]}: expected log-probabilities, of a mass of at most 1, found {shown}... (of the token that follows: {own[n]:.4g}); does the server return logits (vLLM: start it with --logprobs-mode raw_logprobs)?",
            of_row=True,
        )
    twice = (np.diff(np.sort(ids, -1), axis=-1) == 0).any(-1)
    if twice.any():
        raise UnusableAnswerError(
            f"position {positions[int(twice.argmax())]}: expected each class once, found one twice"
        )
    order = np.lexsort((ids, -values), axis=-1)
    ids, values = np.take_along_axis(ids, order, -1), np.take_along_axis(values, order, -1)
    return TopLogprobs(ids, np.where(values > _ZERO, np.minimum(values, 0.0), -np.inf), np.minimum(own, 0.0))
