"""The model of a server writes: one request for each completion, by the completions endpoint of the OpenAI API.

Prompts are sent as token ids; to servers that take text alone (Ollama, TGI), as text. A request holds a seed of its own, so that
a server that keeps to it gives the same completion whoever asks, where its arithmetic does not depend on its batches.
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
from pipeline.generation.draws import stream_key
from pipeline.generation.records import Asked, Completion, FinishReason, IdsFrom, Prompt, Sampling, ServedModel
from pipeline.generation.writer import completion_text
from pipeline.records import BadRow
from pipeline.servers.answers import RefusedError, UnusableAnswerError
from pipeline.servers.client import Client

logger = logging.getLogger(__name__)

_PATH = "/v1/completions"
#: What `owned_by` of `/v1/models` says -> the name of the API.
_APIS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp", "library": "ollama"}
_SEEDS = 1 << 31
_NO_LIMIT = 1 << 30
#: Of the first request, by which a server and a tokenizer are compared.
_PROBED_TOKENS = 8
_MOST_VERSION = 100


@dataclass(frozen=True, slots=True)
class ServedWriter:
    """See `Writer`."""

    client: Client
    tokenizer: PreTrainedTokenizerBase
    model: str
    api: str
    version: str | None
    longest: int
    end_ids: tuple[int, ...]
    takes_ids: bool

    @property
    def name(self) -> str:
        """The served model's."""
        return self.model

    @property
    def device(self) -> str:
        """The device is the server's own."""
        return f"server ({self.api})"

    @property
    def num_ids(self) -> int:
        """The tokenizer's vocabulary."""
        return len(self.tokenizer)

    def info(self) -> ServedModel:
        """As far as the server says."""
        shared = PurePath(self.model).name if self.model.startswith("/") else self.model  # a path of its machine
        return ServedModel(shared, self.api, self.version)

    def batches(self, lengths: Sequence[int], batch_tokens: int) -> list[tuple[list[int], int]]:
        """All of a shard: the server makes the batches."""
        return [(list(range(len(lengths))), max(lengths))] if lengths else []

    def check(self, prompts: Sequence[Prompt], *, batch_tokens: int) -> None:
        """Nothing: the first completion, which is shown, has been asked for."""

    def write(self, asked: Sequence[Asked], sampling: Sampling) -> list[Completion | BadRow]:
        """One request for each."""
        futures = [self._submit(each, sampling) for each in asked]
        found: list[Completion | BadRow] = []
        for each, future in zip(asked, futures, strict=True):
            try:
                found.append(future.result())
            except RefusedError as error:
                found.append(BadRow(each.split, each.prompt.source_row, f"the server refuses the prompt: {error}"))
        return found

    def close(self) -> None:
        """The client's connections."""
        self.client.close()

    def _submit(self, asked: Asked, sampling: Sampling) -> Future[Completion]:
        return self.client.submit(
            _PATH,
            self._request(asked, sampling),
            lambda answer: self._completion(answer, asked, sampling),
            what=f"split {asked.split}, row {asked.prompt.source_row}",
            size=asked.num_tokens + sampling.max_new_tokens,
        )

    def _request(self, asked: Asked, sampling: Sampling) -> dict[str, Any]:
        key = stream_key(sampling.seed, asked.split, asked.prompt.source_row, asked.sample)
        settings = {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p}
        return {
            "model": self.model,
            "prompt": asked.prompt.input_ids.tolist() if self.takes_ids else self._text(asked.prompt),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            **{name: value for name, value in settings.items() if value is not None},
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
            "seed": key % _SEEDS,
            "logprobs": 1,
            **({"return_token_ids": True} if self.api == "vllm" else {}),
        }

    def _text(self, prompt: Prompt) -> str:
        """Without the BOS of a rendered chat: the server puts its own before a text."""
        bos = self.tokenizer.bos_token
        return prompt.text.removeprefix(str(bos)) if bos else prompt.text

    def _completion(self, answer: Any, asked: Asked, sampling: Sampling) -> Completion:
        """What a response says.

        Raises:
            UnusableAnswerError: it is none, or holds token ids that the tokenizer does not have.
        """
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        text = choice.get("text") if isinstance(choice, Mapping) else None
        if not isinstance(text, str):
            raise UnusableAnswerError("expected choices with a text, found none")
        assert isinstance(choice, Mapping)
        reason = _finish_reason(choice, sampling)
        ids, ids_from = self._ids(choice, text)
        ended = reason == "eos" and not (len(ids) and int(ids[-1]) in self.end_ids)
        eos = self.tokenizer.eos_token_id
        if ended and eos is not None:  # a response ends before it
            ids = np.append(ids, np.int32(eos))
        if len(ids) > sampling.max_new_tokens + 1 and ids_from == "server":
            raise UnusableAnswerError(f"expected at most {sampling.max_new_tokens} tokens, found {len(ids)}")
        if ids_from == "server":
            text = completion_text(self.tokenizer, asked.prompt.input_ids, ids, sampling.stop)[0]
        return Completion(text, ids.astype(np.int32), reason, self._logprob(choice, sampling), ids_from)

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
        """Of the model at temperature 1 without filters: what vLLM gives, and others where nothing else was asked for."""
        plain = sampling.temperature == 1 and (sampling.top_p, sampling.top_k, sampling.min_p) == (None, None, None)
        given = choice.get("logprobs")
        values = given.get("token_logprobs") if isinstance(given, Mapping) else None
        if not (plain or self.api == "vllm") or not isinstance(values, list) or not values:
            return None
        numbers = [value for value in values if isinstance(value, int | float) and np.isfinite(value)]
        return float(sum(numbers)) if len(numbers) == len(values) else None


def served_writer(
    client: Client, tokenizer: PreTrainedTokenizerBase, *, model: str | None, end_ids: tuple[int, ...]
) -> ServedWriter:
    """Ask the servers what they serve.

    Raises:
        MisuseError: no such model there, or several and none is named.
        ServerError: no server can be used.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for url in client.urls:
        found = _models(client.get("/v1/models", url))
        if not found:
            raise ServerError(f"{url}: says of no model that it serves it; expected a server with the OpenAI API")
        if model is None and len(found) > 1:
            raise MisuseError(f"{url}: serves {', '.join(found)}; name one with --server-model")
        model = model or next(iter(found))
        if model not in found:
            raise MisuseError(f"{url}: --server-model {model}: expected one that it serves, {', '.join(found)}")
    assert model is not None
    limit = found[model].get("max_model_len")
    api = _APIS.get(str(found[model].get("owned_by", "")).lower(), "openai")
    takes_ids = _takes_ids(client, tokenizer, model)
    if not takes_ids:
        logger.warning(
            "the server takes prompts as text alone: its tokens are not known, those of the data set are the tokenizer's"
        )
    return ServedWriter(
        client,
        tokenizer,
        model,
        api,
        _version(client),
        limit if isinstance(limit, int) and limit > 0 else _NO_LIMIT,
        end_ids,
        takes_ids,
    )


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


def _takes_ids(client: Client, tokenizer: PreTrainedTokenizerBase, model: str) -> bool:
    """Whether prompts may be token ids: asked with a short one.

    Raises:
        MisuseError: the ids that come back are other text to the tokenizer than to the server.
    """
    prompt = [int(i) for i in tokenizer("The", add_special_tokens=False)["input_ids"]]
    request = {
        "model": model,
        "prompt": prompt,
        "max_tokens": _PROBED_TOKENS,
        "temperature": 0,
        "return_token_ids": True,
    }
    try:
        answer = client.submit(_PATH, request, lambda found: found, what="a prompt of token ids", size=2).result()
    except RefusedError:
        return False
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else {}
    ids, text = choice.get("token_ids"), choice.get("text")
    if isinstance(ids, list) and isinstance(text, str) and not same_text(tokenizer, ids, text):
        raise MisuseError(
            f"--model: its tokenizer reads the token ids of the server's model {model} as other text than the server does "
            f"(which says {text[:40]!r}); name the tokenizer of that model"
        )
    return True


def same_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> bool:
    """Whether token ids are the same letters and digits as a text; True where a character is cut in two."""
    if any(not 0 <= i < len(tokenizer) for i in ids):
        return False
    own = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    one, other = ("".join(filter(str.isalnum, each)) for each in (own, text))
    return one == other or "\ufffd" in own + text


def _finish_reason(choice: Mapping[str, Any], sampling: Sampling) -> FinishReason:
    """`eos` only where that is known: of a server that does not say which of the two has stopped it, a stop text has."""
    if choice.get("finish_reason") == "length":
        return "length"
    stopped = choice.get("stop_reason", "" if sampling.stop else None)
    return "stop" if isinstance(stopped, str) else "eos"
