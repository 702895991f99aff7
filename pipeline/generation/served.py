"""Generation by a server: one request per completion to the OpenAI completions endpoint.

Prompts are sent as token ids, or as text to servers that accept text only (Ollama, TGI). Each
request contains its own seed. A server that respects it, and whose arithmetic does not depend on
its batches, returns the same completion to any worker.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.errors import MisuseError, ServerError
from pipeline.generation.agreement import PATH, agree
from pipeline.generation.draws import stream_key
from pipeline.generation.records import Asked, Completion, FinishReason, IdsFrom, Prompt, Sampling, ServedModel
from pipeline.generation.writer import completion_text, end_ids, special_stops, turn_end
from pipeline.records import BadRow
from pipeline.servers.answers import RefusedError, UnusableAnswerError
from pipeline.servers.client import Client

logger = logging.getLogger(__name__)

#: Value of `owned_by` in `/v1/models` -> name of the API.
_APIS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp", "library": "ollama"}
_SEEDS = 1 << 31
_NO_LIMIT = 1 << 30
#: APIs that accept token ids as stops.
_STOP_IDS = ("vllm", "sglang")
_MOST_VERSION = 100


@dataclass(frozen=True, slots=True)
class ServedWriter:
    """A writer behind a server; see `Writer` for the members."""

    client: Client
    tokenizer: PreTrainedTokenizerBase
    model: str
    api: str
    version: str | None
    longest: int
    end_ids: tuple[int, ...]
    takes_ids: bool
    settings: Mapping[str, float]
    """The sampling settings of requests."""
    own_settings: tuple[str, ...]
    """The settings that the server does not accept."""
    special_stops: Mapping[str, int]
    """The special tokens among `--stop` -> their ids."""
    text_end: int | None
    """The end token of completions of plain texts, used if the server does not report it; None:
    unknown."""
    chat_end: int | None
    """The same for chats."""

    @property
    def name(self) -> str:
        """Name of the served model."""
        return self.model

    @property
    def device(self) -> str:
        """The server's API; the device itself is unknown."""
        return f"server ({self.api})"

    @property
    def num_ids(self) -> int:
        """Size of the tokenizer's vocabulary."""
        return len(self.tokenizer)

    def info(self) -> ServedModel:
        """Return what the server reports about its model, without a local directory."""
        shared = PurePath(self.model).name if self.model.startswith("/") else self.model
        return ServedModel(shared, self.api, self.version, self.own_settings)

    def batches(self, lengths: Sequence[int], batch_tokens: int) -> list[tuple[list[int], int]]:
        """Return one batch with all completions of a shard: the server makes its own batches."""
        return [(list(range(len(lengths))), max(lengths))] if lengths else []

    def check(self, prompts: Sequence[Prompt], *, batch_tokens: int) -> None:
        """Warn if the end tokens are unknown.

        A request for the first completion, which is logged, has already checked the server.
        """
        if prompts and self.api not in _STOP_IDS and self._end(prompts[0]) is None:
            logger.warning(
                "the server does not report which token ends a completion, and it may be any of %s: none is added, so that no end is "
                "learnt (finish reason stop)",
                ", ".join(map(str, self.end_ids)) or "none",
            )

    def write(self, asked: Sequence[Asked], sampling: Sampling) -> list[Completion | BadRow]:
        """Send one request per completion and wait for the answers."""
        futures = [self._submit(each, sampling) for each in asked]
        found: list[Completion | BadRow] = []
        for each, future in zip(asked, futures, strict=True):
            try:
                found.append(future.result())
            except RefusedError as error:
                found.append(
                    BadRow(each.split, each.prompt.source_row, f"the server refuses the prompt: {error.reason}")
                )
        return found

    def close(self) -> None:
        """Close the client's connections."""
        self.client.close()

    def _submit(self, asked: Asked, sampling: Sampling) -> Future[Completion]:
        return self.client.submit(
            PATH,
            self._request(asked, sampling),
            lambda answer: self._completion(answer, asked, sampling),
            what=f"split {asked.split}, row {asked.prompt.source_row}",
            size=asked.num_tokens + sampling.max_new_tokens,
        )

    def _request(self, asked: Asked, sampling: Sampling) -> dict[str, Any]:
        key = stream_key(sampling.seed, asked.split, asked.prompt.source_row, asked.sample)
        stop_ids = list(self.special_stops.values())
        return {
            "model": self.model,
            "prompt": asked.prompt.input_ids.tolist() if self.takes_ids else self._text(asked.prompt),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            **self.settings,
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
            "seed": key % _SEEDS,
            "logprobs": 1,
            **({"return_token_ids": True} if self.api == "vllm" else {}),
            **({"stop_token_ids": stop_ids} if stop_ids and self.api in _STOP_IDS else {}),
        }

    def _text(self, prompt: Prompt) -> str:
        """Return the prompt without BOS: the server adds its own."""
        bos = self.tokenizer.bos_token
        return prompt.text.removeprefix(str(bos)) if bos else prompt.text

    def _completion(self, answer: Any, asked: Asked, sampling: Sampling) -> Completion:
        """Convert a response to a completion.

        Raises:
            UnusableAnswerError: there is no completion, it ends for another reason than an end or
                its length, or the tokenizer does not have its token ids.
        """
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        text = choice.get("text") if isinstance(choice, Mapping) else None
        if not isinstance(text, str):
            raise UnusableAnswerError("expected choices with a text, found none")
        assert isinstance(choice, Mapping)
        reason, end = self._finish(choice, sampling)
        ids, ids_from = self._ids(choice, text)
        # Some responses exclude the end token.
        if reason == "eos" and not (len(ids) and int(ids[-1]) in self.end_ids):
            end = self._end(asked.prompt) if end is None else end
            if end is None:
                reason = "stop"
            else:
                ids = np.append(ids, np.int32(end))
        if len(ids) > sampling.max_new_tokens + 1 and ids_from == "server":
            raise UnusableAnswerError(f"expected at most {sampling.max_new_tokens} tokens, found {len(ids)}")
        if ids_from == "server":
            text = completion_text(self.tokenizer, asked.prompt.input_ids, ids, sampling.stop)[0]
        return Completion(text, ids.astype(np.int32), reason, self._logprob(choice, sampling), ids_from)

    def _finish(self, choice: Mapping[str, Any], sampling: Sampling) -> tuple[FinishReason, int | None]:
        """Return why a completion ends, and its end token if the server (vLLM, SGLang) reports it.

        If the server does not report whether an end token or a stop text ended the completion, and
        there are stop texts, the reason is `stop`.
        """
        given = choice.get("finish_reason")
        if given in ("length", "eos_token"):
            return ("length" if given == "length" else "eos"), None
        if given not in (
            "stop",
            "stop_sequence",
        ):  # abort, error, content_filter, repetition or null
            raise UnusableAnswerError(f"expected the finish reason stop or length, found {given!r}", of_row=True)
        key = "stop_reason" if "stop_reason" in choice else "matched_stop"
        by, texts = choice.get(key), set(sampling.stop) - set(self.special_stops)
        if isinstance(by, int) and by in self.end_ids:
            return "eos", by
        said = key == "stop_reason" and key in choice and given == "stop"
        return ("stop" if isinstance(by, str) or (texts and not said) else "eos"), None

    def _end(self, prompt: Prompt) -> int | None:
        return self.chat_end if prompt.is_chat else self.text_end

    def _ids(self, choice: Mapping[str, Any], text: str) -> tuple[np.ndarray, IdsFrom]:
        given = choice.get("token_ids")
        if isinstance(given, list):
            ids = np.asarray(given, dtype=np.int64)
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.tokenizer):
                raise UnusableAnswerError(
                    f"expected token ids below {len(self.tokenizer)}, found {int(ids.max())}; --model names the tokenizer of "
                    "the server's model"
                )
            return ids, "server"
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64), "tokenizer"

    def _logprob(self, choice: Mapping[str, Any], sampling: Sampling) -> float | None:
        """Return the log-probability under the model at temperature 1 without filters, else None.

        vLLM always reports this value; other servers only if no other sampling is requested.
        """
        plain = sampling.temperature == 1 and (sampling.top_p, sampling.top_k, sampling.min_p) == (None, None, None)
        given = choice.get("logprobs")
        values = given.get("token_logprobs") if isinstance(given, Mapping) else None
        if not (plain or self.api == "vllm") or not isinstance(values, list) or not values:
            return None
        numbers = [value for value in values if isinstance(value, int | float) and np.isfinite(value)]
        return float(sum(numbers)) if len(numbers) == len(values) else None


def served_writer(
    client: Client, tokenizer: PreTrainedTokenizerBase, *, model: str | None, sampling: Sampling, stated_ends: object
) -> ServedWriter:
    """Ask the servers for their model, and build a writer.

    Raises:
        MisuseError: there is no such model, several and none is named, or the server does not
            accept a filter.
        ServerError: no server is available.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for url in client.urls:
        found = _models(client.get("/v1/models", url))
        if not found:
            raise ServerError(f"{url}: lists no model; expected a server with the OpenAI API")
        if model is None and len(found) > 1:
            raise MisuseError(f"{url}: serves {', '.join(found)}; name one with --server-model")
        model = model or next(iter(found))
        if model not in found:
            raise MisuseError(f"{url}: --server-model {model}: expected one that it serves, {', '.join(found)}")
    assert model is not None
    limit = found[model].get("max_model_len")
    api = _APIS.get(str(found[model].get("owned_by", "")).lower(), "openai")
    settings = {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p}
    asked = {name: value for name, value in settings.items() if value is not None}
    takes_ids, taken, own = agree(client, tokenizer, model, api, asked, sampling.temperature)
    if not takes_ids:
        logger.warning(
            "the server takes prompts as text only: its tokens are not known, and the data set has those of the tokenizer"
        )
    stops, chat_end = special_stops(tokenizer, sampling.stop), turn_end(tokenizer)
    if stops and api not in _STOP_IDS:
        logger.warning(
            "--stop %s: a special token, which the server treats as text; it ends a completion only where the server writes special "
            "tokens out",
            ", ".join(stops),
        )
    known = end_ids(stated_ends, tokenizer)
    ends = tuple(sorted({*known, *stops.values(), *([] if chat_end is None else [chat_end])}))
    return ServedWriter(
        client=client,
        tokenizer=tokenizer,
        model=model,
        api=api,
        version=_version(client),
        longest=limit if isinstance(limit, int) and limit > 0 else _NO_LIMIT,
        end_ids=ends,
        takes_ids=takes_ids,
        settings=taken,
        own_settings=own,
        special_stops=stops,
        text_end=_only(_ends_of_texts(stated_ends, tokenizer), stops),
        chat_end=_only(known if chat_end is None else (chat_end,), stops),
    )


def _ends_of_texts(stated: object, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the possible end tokens of a completion of a plain text.

    EOS of the tokenizer, unless the generation config lists other end tokens only.
    """
    eos = tokenizer.eos_token_id
    its = end_ids(stated, tokenizer) if stated is None else tuple(stated if isinstance(stated, list) else [stated])
    return (eos,) if isinstance(eos, int) and eos in its else its


def _only(ends: Sequence[int], stops: Mapping[str, int]) -> int | None:
    """Return the only token that can end a completion, or None if there are several or none."""
    possible = {*ends, *stops.values()}
    return possible.pop() if len(possible) == 1 else None


def _models(answer: Any) -> dict[str, Mapping[str, Any]]:
    listed = answer.get("data") if isinstance(answer, Mapping) else None
    return {
        str(each["id"]): each
        for each in (listed if isinstance(listed, list) else ())
        if isinstance(each, Mapping) and "id" in each
    }


def _version(client: Client) -> str | None:
    answer = client.get("/version")
    found = answer.get("version") if isinstance(answer, Mapping) else None
    return found[:_MOST_VERSION] if isinstance(found, str) else None
