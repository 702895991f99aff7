"""Parse a server response in one of three layouts to tokens and top log-probabilities.

Each choice of a response yields one row. The layouts are distinguished by their keys.

- vLLM: `prompt_logprobs`, a list with a mapping {token id: {logprob, rank, ...}} for each token of
  the prompt.
- completions: `logprobs` with `tokens`, `token_logprobs` and `top_logprobs`, made with `echo`.
- chat completions: `logprobs.content`, a list of {token, logprob, top_logprobs}, for the completion
  only.

The keys may be at the top level of a line or inside `choices`, as servers send them. In batch files
the whole response is inside `response`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.errors import BadRowError, SourceError
from pipeline.sharing.entries import Served, TopEntries

#: The log-probability that servers return for a probability of 0.
_LOWEST = -9999.0
_RETURN_IDS = "ask the server for them with return_token_ids"


@dataclass(frozen=True, slots=True)
class _Entry:
    """The log-probabilities of one token, by token id.

    `num_top` is the number of most likely classes; `own` is the token that the entry belongs to, or
    -1 if that is not known.
    """

    classes: Mapping[int, float]
    num_top: int
    own: int = -1


def read_responses(
    line: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, requests: Mapping[str, Mapping[str, Any]] | None = None
) -> Iterator[TopEntries]:
    """Parse one line; yields one row per choice.

    Args:
        requests: `custom_id` -> the body of the request.

    Raises:
        BadRowError: the request failed.
        SourceError: the line has none of the layouts, or tokens cannot be identified.
    """
    body = _body(line)
    request = _request(line, requests)
    kept = {"custom_id": str(line["custom_id"])} if body is not line and line.get("custom_id") is not None else {}
    choices = body.get("choices") if isinstance(body.get("choices"), list) else None
    rest = {key: value for key, value in body.items() if value is not None and key != "choices"}
    if choices == []:
        raise BadRowError("expected choices, found none; the request has failed")
    shared = isinstance(rest.get("prompt_logprobs"), list)  # all choices share the prompt: one row
    for number, choice in enumerate([{}] if choices is None or shared else choices):
        if choice.get("finish_reason") in ("error", "abort"):
            raise BadRowError(f"choice {number}: the request has failed: finish_reason {choice['finish_reason']!r}")
        record = {**request, **choice, **rest}
        place = choice.get("index", number)
        record["prompt"] = _prompt_of(record.get("prompt"), place, len(choices or [0]))
        try:
            yield _read(record, tokenizer, kept)
        except (SourceError, BadRowError) as error:
            if choices is None or len(choices) < 2:
                raise
            raise type(error)(f"choice {number}: {error}") from None


def _body(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """The response itself, unwrapped from a line of a batch file.

    Raises:
        BadRowError: the request failed.
    """
    _refuse_error(line)
    if "response" not in line:
        return line
    response = line["response"]
    if not isinstance(response, Mapping):
        raise BadRowError(f"the request has failed: response is {response!r}")
    status, body = response.get("status_code", 200), response.get("body", response)
    if isinstance(body, Mapping):
        _refuse_error(body)
    if status != 200 or not isinstance(body, Mapping):
        raise BadRowError(f"the request has failed: status_code {status}, body {str(body)[:100]!r}")
    return body


def _refuse_error(record: Mapping[str, Any]) -> None:
    error = record if record.get("object") == "error" else record.get("error")
    if error:
        said = error.get("message") or error if isinstance(error, Mapping) else error
        raise BadRowError(f"the request has failed: {' '.join(str(said).split())[:200]}")


def _request(line: Mapping[str, Any], requests: Mapping[str, Mapping[str, Any]] | None) -> Mapping[str, Any]:
    """The fields of the request, from the line itself or looked up by `custom_id`."""
    found = line.get("request")
    if isinstance(found, Mapping):
        found = found.get("body", found)
    elif requests is not None:
        found = requests.get(str(line.get("custom_id")))
        if found is None:
            raise SourceError(
                f"custom_id {line.get('custom_id')!r}: expected a request of this name in --requests, found none"
            )
    names = ("messages", "prompt", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
    return {name: found[name] for name in names if found.get(name) is not None} if isinstance(found, Mapping) else {}


def _prompt_of(prompt: Any, place: int, choices: int) -> Any:
    """The prompt of one choice from a list of prompts; choices are grouped by prompt."""
    if not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int):
        return prompt
    if choices % len(prompt) or not 0 <= place < choices:
        raise SourceError(f"expected as many choices for each of {len(prompt)} prompts, found {choices}")
    return prompt[place * len(prompt) // choices]


def _read(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, kept: Mapping[str, str]) -> TopEntries:
    logprobs = record.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if isinstance(record.get("prompt_logprobs"), list):
        ids = _prompt_ids(record, tokenizer)
        entries = _vllm_entries(record["prompt_logprobs"], ids)
    elif isinstance(content, list):
        ids, entries = _chat(record, content, tokenizer)
    elif isinstance(logprobs, Mapping) and isinstance(logprobs.get("top_logprobs"), list):
        ids, entries = _completion(record, logprobs, tokenizer)
    else:
        found = ", ".join(sorted(key for key, value in record.items() if value is not None)) or "nothing"
        raise SourceError(f"expected prompt_logprobs, logprobs.top_logprobs or logprobs.content, found {found}")
    if len(ids) != len(entries):
        raise SourceError(
            f"expected an entry for each of {len(ids)} tokens, found {len(entries)}; ask the server for prompt_token_ids with return_token_ids"
        )
    return _arrays(ids, entries, kept)


def _arrays(ids: Sequence[int], entries: Sequence[_Entry | None], kept: Mapping[str, str]) -> TopEntries:
    width = max((len(entry.classes) for entry in entries if entry is not None), default=0)
    classes = np.full((len(entries), width), -1, dtype=np.int64)
    values = np.full((len(entries), width), -np.inf)
    for j, entry in enumerate(entries):
        if entry is not None:
            classes[j, : len(entry.classes)] = list(entry.classes)
            values[j, : len(entry.classes)] = [
                value if value != -math.inf else _LOWEST for value in entry.classes.values()
            ]
    served = Served(
        np.asarray([0 if entry is None else entry.num_top for entry in entries], dtype=np.int64),
        np.asarray([-1 if entry is None else entry.own for entry in entries], dtype=np.int64),
    )
    blank = np.asarray([entry is not None and not entry.classes for entry in entries], dtype=bool)
    learnt = np.ones(len(ids), dtype=bool)
    return TopEntries(np.asarray(ids, dtype=np.int64), classes, values, learnt, blank, served, kept)


def _vllm_entries(given: Sequence[Any], ids: Sequence[int]) -> list[_Entry | None]:
    """Parse vLLM's entries; a token with a rank above their number is the prompt's own token."""
    entries: list[_Entry | None] = []
    ranked = False
    for entry in given:
        if entry is None:
            entries.append(None)
            continue
        classes = {int(t): float(v["logprob"] if isinstance(v, Mapping) else v) for t, v in entry.items()}
        ranks = {int(t): v["rank"] for t, v in entry.items() if isinstance(v, Mapping) and v.get("rank") is not None}
        ranked = ranked or len({*ranks.values()}) > 1 or any(rank > 1 for rank in ranks.values())
        extra = [token for token, rank in ranks.items() if rank > len(classes)]
        entries.append(_Entry(classes, len(classes) - len(extra), extra[0] if extra else -1))
    if not ranked and all(entry is None or len(entry.classes) < 2 for entry in entries):
        # without ranks, each entry has only the prompt's own token; it is surely the most likely
        # one if it has half of the mass
        return [
            _Entry(e.classes, 0) if e is not None and e.classes and max(e.classes.values()) < math.log(0.5) else e
            for e in entries
        ]
    return entries


def _prompt_ids(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = record.get("prompt_token_ids")
    if ids is None and isinstance(record.get("prompt"), str):
        ids = tokenizer(record["prompt"])["input_ids"]
    if ids is None and isinstance(record.get("prompt"), list):
        ids = record["prompt"]
    if ids is None:
        raise SourceError(f"expected prompt_token_ids, or the text in prompt; {_RETURN_IDS}")
    return [int(i) for i in ids]


def _completion(
    record: Mapping[str, Any], logprobs: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[_Entry | None]]:
    """Parse a completion: tokens of prompt and completion, and their entries.

    With `echo` the response has both; otherwise the prompt is put before the completion.
    """
    tops = logprobs["top_logprobs"]
    prompt, completion = record.get("prompt_token_ids"), record.get("token_ids")
    echoed = not tops or tops[0] is None
    if prompt is not None and len(prompt) == len(tops) and (echoed or completion is None):
        ids = list(prompt)
    elif prompt is not None and completion is not None and echoed:
        ids = [*prompt, *completion]
    else:
        known = completion if completion is not None else prompt if prompt is not None and echoed else None
        ids = (
            [_id_at(j, token, tokenizer) for j, token in enumerate(logprobs["tokens"])]
            if known is None
            else list(known)
        )
        if not echoed:
            prompt = _prompt_ids(record, tokenizer) if prompt is not None or record.get("prompt") is not None else None
            if prompt is None:
                raise SourceError(
                    "the first token has log-probabilities, so that the prompt is not among the tokens; make the response with echo, "
                    "or give prompt_token_ids (return_token_ids) or the requests with --requests FILE.jsonl"
                )
    before = (
        [] if echoed or len(ids) != len(tops) or prompt is None or ids == list(prompt) else [int(i) for i in prompt]
    )
    values = logprobs.get("token_logprobs") or [None] * len(tops)
    entries: list[_Entry | None] = [None] * len(before)
    for token, value, top in zip(ids, values, tops, strict=False):
        if top is None:
            entries.append(None)
            continue
        classes = {token_id(t, tokenizer): float(v) for t, v in top.items()}
        entries.append(_with_own(classes, int(token), value))
    entries += [None if top is None else _Entry({}, 0) for top in tops[len(entries) - len(before) :]]
    return [*before, *(int(i) for i in ids)], entries


def _with_own(classes: Mapping[int, float], token: int, value: float | None) -> _Entry:
    if token in classes or value is None:
        return _Entry(classes, len(classes))
    return _Entry({**classes, token: float(value)}, len(classes), token)


def _chat(
    record: Mapping[str, Any], content: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[_Entry | None]]:
    prompt = record.get("prompt_token_ids")
    if prompt is None and record.get("messages") is not None:
        prompt = _templated(record, tokenizer)
    if prompt is None:
        raise SourceError(
            f"expected prompt_token_ids beside logprobs.content; {_RETURN_IDS}, or give the requests with --requests FILE.jsonl "
            "(the batch's input file, with the same custom_id)"
        )
    given = record.get("token_ids")
    completion = (
        [int(i) for i in given]
        if given is not None
        else [_id_at(j, part["token"], tokenizer) for j, part in enumerate(content)]
    )
    if len(completion) != len(content):
        raise SourceError(f"expected as many token_ids as logprobs.content, found {len(completion)} and {len(content)}")
    entries: list[_Entry | None] = [None] * len(prompt)
    for j, (token, part) in enumerate(zip(completion, content, strict=True)):
        classes = {
            _id_at(j, other["token"], tokenizer): float(other["logprob"]) for other in part.get("top_logprobs") or []
        }
        own = _with_own(classes, token, float(part["logprob"]))
        entries.append(_Entry({**own.classes, token: float(part["logprob"])}, own.num_top, own.own))
    return [*(int(i) for i in prompt), *completion], entries


def needs_template(line: Mapping[str, Any]) -> bool:
    """Whether a response of a chat lacks `prompt_token_ids`, so its prompt must be rendered."""
    body = line.get("response", line)
    body = body.get("body", body) if isinstance(body, Mapping) else {}
    choices = body.get("choices") if isinstance(body, Mapping) else None
    parts = [body, *(choices if isinstance(choices, list) else [])]
    logprobs = [part.get("logprobs") for part in parts if isinstance(part, Mapping)]
    chat = any(isinstance(each, Mapping) and isinstance(each.get("content"), list) for each in logprobs)
    return chat and all(part.get("prompt_token_ids") is None for part in parts if isinstance(part, Mapping))


def _templated(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of the prompt, rendered by the chat template."""
    if not tokenizer.chat_template:
        raise SourceError(f"expected prompt_token_ids, or a tokenizer with a chat template; {_RETURN_IDS}")
    messages = []
    for turn in record["messages"]:
        text = turn.get("content")
        if isinstance(text, list):
            if any(part.get("type") != "text" for part in text):
                raise SourceError("messages: expected text, found parts of other types")
            text = "".join(part["text"] for part in text)
        messages.append({**turn, "content": text})
    closed = not record.get("continue_final_message")
    try:
        ids: Any = tokenizer.apply_chat_template(
            messages,
            tools=record.get("tools"),
            add_generation_prompt=record.get("add_generation_prompt", closed),
            continue_final_message=not closed,
            tokenize=True,
            return_dict=False,
            **(record.get("chat_template_kwargs") or {}),
        )
    except jinja2.TemplateError as error:
        raise SourceError(f"messages: the chat template refuses them: {error}") from None
    return [int(i) for i in ids]


def _id_at(j: int, token: str, tokenizer: PreTrainedTokenizerBase) -> int:
    try:
        return token_id(token, tokenizer)
    except SourceError as error:
        raise SourceError(f"entry {j}: {error}") from None


def token_id(token: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of a token given as `token_id:123` (vLLM) or by its text.

    Raises:
        SourceError: several tokens have the text, or none.
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


def read_requests(path: str | Path | None) -> dict[str, Mapping[str, Any]] | None:
    """Read the input file of a batch: `custom_id` -> body. None without a file.

    Raises:
        SourceError: the file cannot be read, or a line is not a request.
    """
    if path is None:
        return None
    requests: dict[str, Mapping[str, Any]] = {}
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                content = json.loads(line)
                if (
                    not isinstance(content, dict)
                    or "custom_id" not in content
                    or not isinstance(content.get("body"), dict)
                ):
                    raise SourceError(f"{path} line {number}: expected a request with custom_id and body")
                name = str(content["custom_id"])
                if name in requests:
                    raise SourceError(f"{path} line {number}: custom_id {name!r} is there twice")
                requests[name] = content["body"]
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path}: cannot be read ({error})") from None
    return requests
