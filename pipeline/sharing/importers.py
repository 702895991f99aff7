"""A cache from what vLLM and OpenAI-compatible servers return, as JSON lines."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pipeline.cache import Cache
from pipeline.capture import LabelledRow, top_soft_labels, write_cache
from pipeline.config import ImportConfig
from pipeline.errors import BadRowError, EncodingError, PipelineError, SourceError
from pipeline.models import load_tokenizer
from pipeline.records import TeacherScores, TopK
from pipeline.sharing.responses import Response, read_response

#: Rows from which the shift is told, and the standard errors by which one must win.
_PROBED_ROWS = 200
_STANDARD_ERRORS = 4.0


def run(config: ImportConfig) -> Cache:
    """`softlabel import`."""
    tokenizer = load_tokenizer(config.tokenizer)
    return import_responses(
        config.input,
        config.output,
        tokenizer=tokenizer,
        teacher=config.teacher,
        top_k=config.top_k,
        split=config.split,
        position_zero=config.position_zero,
        max_length=config.max_length,
        overwrite=config.overwrite,
    )


def import_responses(
    files: Iterable[str | Path],
    output: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    teacher: str,
    top_k: int,
    split: str = "train",
    position_zero: Literal["auto", "empty", "filled"] = "auto",
    max_length: int | None = None,
    overwrite: bool = False,
) -> Cache:
    """Write a `top-k` cache from a server's responses, one a line.

    Args:
        top_k: how many log-probabilities to keep of each position; the server must have returned as many.
        position_zero: whether entry j speaks of token j (`empty`: the first has nothing before it), or of the token after it (`filled`).
            `auto` compares the weight of the token that does follow under both, over the first 200 rows.

    Returns:
        The cache. Residual mass is known at temperature 1 only, so students train at 1.

    Raises:
        SourceError: a line that is none of the layouts, or a shift that cannot be told.
        BadRowError: a row whose log-probabilities are no distribution.
    """
    responses = _read(files, tokenizer)
    head = list(itertools.islice(responses, _PROBED_ROWS))
    if not head:
        raise SourceError("expected responses, found no line")
    empty = tell_shift([response for _, response in head]) if position_zero == "auto" else position_zero == "empty"
    rows = (
        _row(where, response, empty, top_k, tokenizer, split) for where, response in itertools.chain(head, responses)
    )
    return write_cache(
        rows,
        output,
        task="causal-lm",
        tokenizer=tokenizer,
        encoding=TopK(top_k, (1.0,)),
        teacher=teacher,
        max_length=max_length,
        source="responses",
        overwrite=overwrite,
    )


def tell_shift(responses: Iterable[Response]) -> bool:
    """Whether entry j speaks of token j (True), or of token j + 1: the one under which the tokens that follow weigh more.

    Raises:
        SourceError: neither wins by 4 paired standard errors.
    """
    differences = []
    for response in responses:
        for j, entry in enumerate(response.entries):
            at = response.first + j
            if entry and 0 < at < len(response.input_ids) - 1:
                here, after = (math.exp(entry.get(response.input_ids[i], -math.inf)) for i in (at, at + 1))
                differences.append(here - after)
    values = np.asarray(differences)
    spread = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    lead = float(values.mean()) / spread if len(values) and spread > 0 else 0.0
    if abs(lead) < _STANDARD_ERRORS:
        raise SourceError(
            f"whether log-probabilities belong to their token or to the one after it cannot be told from {len(values)} positions; "
            "say it with --position-zero empty (vLLM, OpenAI) or filled"
        )
    return lead > 0


def _read(files: Iterable[str | Path], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, Response]]:
    for file in files:
        try:
            with Path(file).open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        where = f"{Path(file).name} line {number}"
                        yield where, _parse(where, line, tokenizer)
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{file}: cannot be read ({error})") from None


def _parse(where: str, line: str, tokenizer: PreTrainedTokenizerBase) -> Response:
    try:
        content = json.loads(line)
        if not isinstance(content, dict):
            raise SourceError(f"expected an object, found {type(content).__name__}")
        return read_response(content, tokenizer)
    except PipelineError as error:
        raise SourceError(f"{where}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{where}: not a response of a known layout: {type(error).__name__}: {error}") from None


def _row(
    where: str, response: Response, empty: bool, top_k: int, tokenizer: PreTrainedTokenizerBase, split: str
) -> LabelledRow:
    """Entries moved to the position that made them; a position without an entry is not supervised."""
    ids = response.input_ids
    supervised = np.zeros(len(ids), dtype=bool)
    kept_ids: list[list[int]] = []
    kept: list[list[float]] = []
    nll: list[float] = []
    for j, entry in enumerate(response.entries):
        position = response.first + j - (1 if empty else 0)
        if not entry or not 0 <= position < len(ids) - 1:
            continue
        best = sorted(entry.items(), key=lambda item: -item[1])[:top_k]
        if len(best) < top_k:
            raise BadRowError(
                f"{where}: position {position}: expected {top_k} log-probabilities, found {len(best)}; set --top-k to what the server returned"
            )
        supervised[position] = True
        kept_ids.append([token for token, _ in best])
        kept.append([value for _, value in best])
        nll.append(-entry.get(ids[position + 1], math.nan))
    if not kept:
        raise BadRowError(f"{where}: no position has log-probabilities")
    try:
        soft = top_soft_labels(kept_ids, kept, len(tokenizer), k=top_k)
    except EncodingError as error:
        raise BadRowError(f"{where}: {error}") from None
    predicted = [token for token, known in zip(ids[1:], supervised, strict=False) if known]
    text = str(tokenizer.decode(predicted, skip_special_tokens=True))
    scores = TeacherScores(torch.tensor(nll), torch.full((len(nll),), math.nan))
    return LabelledRow(
        ids, soft_labels=soft, scores=scores, supervised=supervised, text_bytes=len(text.encode()), split=split
    )
