"""One response of an inference server -> tokens and the top log-probabilities beside them. Three layouts, told apart by their keys.

- vLLM: `prompt_logprobs`, a list with a mapping {token id: {logprob, rank, ...}} for each token of the prompt.
- completions: `logprobs` with `tokens`, `token_logprobs` and `top_logprobs`, made with `echo`.
- chat completions: `logprobs.content`, a list of {token, logprob, top_logprobs}, for the completion only.

Each may stand at the top of the line, or inside `choices[0]` as the server sends it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.errors import SourceError


@dataclass(frozen=True, slots=True)
class Response:
    """T tokens, and L entries: entry j belongs to token `first + j`, or to the one after it (see `import_responses`)."""

    input_ids: list[int]
    first: int
    entries: list[dict[int, float] | None]
    """Token id -> log-probability, nats; None where the server gave nothing."""


def read_response(line: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Response:
    """Parse one line.

    Raises:
        SourceError: none of the layouts, or tokens that cannot be told.
    """
    choice = line["choices"][0] if isinstance(line.get("choices"), list) and line["choices"] else {}
    record = {**choice, **{key: value for key, value in line.items() if value is not None and key != "choices"}}
    logprobs = record.get("logprobs")
    if isinstance(record.get("prompt_logprobs"), list):
        entries = [_vllm_entry(entry) for entry in record["prompt_logprobs"]]
        return _aligned(_prompt_ids(record, tokenizer), entries)
    if isinstance(logprobs, Mapping) and isinstance(logprobs.get("content"), list):
        return _chat(record, logprobs["content"], tokenizer)
    if isinstance(logprobs, Mapping) and isinstance(logprobs.get("top_logprobs"), list):
        entries = [
            None if entry is None else {token_id(t, tokenizer): float(v) for t, v in entry.items()}
            for entry in logprobs["top_logprobs"]
        ]
        ids = record.get("prompt_token_ids") or [token_id(token, tokenizer) for token in logprobs["tokens"]]
        for token, value, entry in zip(ids, logprobs.get("token_logprobs") or [], entries, strict=False):
            if entry is not None and value is not None:
                entry.setdefault(int(token), float(value))
        return _aligned([int(i) for i in ids], entries)
    found = ", ".join(sorted(map(str, record))) or "nothing"
    raise SourceError(f"expected prompt_logprobs, logprobs.top_logprobs or logprobs.content, found {found}")


def _aligned(ids: list[int], entries: list[dict[int, float] | None]) -> Response:
    if len(ids) != len(entries):
        raise SourceError(
            f"expected an entry for each of {len(ids)} tokens, found {len(entries)}; ask the server for prompt_token_ids with return_token_ids"
        )
    return Response(ids, 0, entries)


def _vllm_entry(entry: Any) -> dict[int, float] | None:
    if entry is None:
        return None
    return {
        int(token): float(value["logprob"] if isinstance(value, Mapping) else value) for token, value in entry.items()
    }


def _prompt_ids(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = record.get("prompt_token_ids")
    if ids is None and isinstance(record.get("prompt"), str):
        ids = tokenizer(record["prompt"])["input_ids"]
    if ids is None:
        raise SourceError(
            "expected prompt_token_ids, or the text in prompt; ask the server for them with return_token_ids"
        )
    return [int(i) for i in ids]


def _chat(
    record: Mapping[str, Any], content: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> Response:
    prompt = record.get("prompt_token_ids")
    if prompt is None:
        raise SourceError(
            "expected prompt_token_ids beside logprobs.content; ask the server for them with return_token_ids"
        )
    given = record.get("token_ids")
    completion = (
        [int(i) for i in given] if given is not None else [token_id(part["token"], tokenizer) for part in content]
    )
    entries: list[dict[int, float] | None] = []
    for token, part in zip(completion, content, strict=True):
        entry = {
            token_id(other["token"], tokenizer): float(other["logprob"]) for other in part.get("top_logprobs") or []
        }
        entries.append({**entry, token: float(part["logprob"])})
    return Response([*(int(i) for i in prompt), *completion], len(prompt), entries)


def token_id(token: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of a token: `token_id:123` as vLLM writes it, else the one token whose text this is.

    Raises:
        SourceError: several tokens have this text, or none.
    """
    if token.startswith("token_id:"):
        return int(token.removeprefix("token_id:"))
    ids = _texts(tokenizer).get(token, ())
    if len(ids) != 1:
        raise SourceError(
            f"token {token!r}: {len(ids)} tokens of the tokenizer have this text, expected one; start the server so that it returns ids "
            "(vLLM: --return-tokens-as-token-ids)"
        )
    return ids[0]


@lru_cache(maxsize=2)
def _texts(tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[int, ...]]:
    texts: dict[str, tuple[int, ...]] = {}
    for i in range(len(tokenizer)):
        text = str(tokenizer.decode([i]))
        texts[text] = (*texts.get(text, ()), i)
    return texts
