"""Detection of the settings that a server accepts, with short prompts before the first shard."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.errors import MisuseError
from pipeline.servers.answers import RefusedError
from pipeline.servers.client import Client

logger = logging.getLogger(__name__)

PATH = "/v1/completions"
#: Number of tokens of the first request, which compares the server with the tokenizer.
_PROBED_TOKENS = 8
#: Sampling settings with neutral values. Every request contains all of them: for an absent setting,
#: a server uses its own default or the model's generation config.
_NEUTRAL = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
#: The same for llama.cpp, which has other names, and other samplers that a model file may enable.
_NEUTRAL_LLAMA_CPP = {
    **{name: value for name, value in _NEUTRAL.items() if name != "repetition_penalty"},
    "top_k": 0,
    "repeat_penalty": 1.0,
    "typical_p": 1.0,
    "top_n_sigma": -1.0,
    "xtc_probability": 0.0,
    "dry_multiplier": 0.0,
    "dynatemp_range": 0.0,
    "mirostat": 0,
}
#: The completions endpoint of Ollama reads these three. It ignores the others, for which the
#: Modelfile applies.
_NEUTRAL_OLLAMA = {name: _NEUTRAL[name] for name in ("top_p", "presence_penalty", "frequency_penalty")}
_UNREAD_BY_OLLAMA = ("top_k", "min_p", "repeat_penalty")


def agree(
    client: Client,
    tokenizer: PreTrainedTokenizerBase,
    model: str,
    api: str,
    asked: Mapping[str, float],
    temperature: float,
) -> tuple[bool, dict[str, float], tuple[str, ...]]:
    """Find out which settings requests may contain, with short prompts.

    Args:
        asked: the filters that the flags set.

    Returns:
        Whether prompts may be token ids; the sampling settings of requests; and the names of the
            settings that the server does not accept.

    Raises:
        MisuseError: the server does not accept a requested filter, or the tokenizer decodes the
            returned ids to another text than the server.
        ServerError: no server is available, or it refuses even such a request.
    """
    neutral = {"llama.cpp": _NEUTRAL_LLAMA_CPP, "ollama": _NEUTRAL_OLLAMA}.get(api, _NEUTRAL)
    settings = {**neutral, **asked}
    own = _UNREAD_BY_OLLAMA if api == "ollama" else ()
    while True:
        takes_ids, refusal = _asked(client, tokenizer, model, {"temperature": temperature, **settings}, api)
        refused = [] if refusal is None else [name for name in settings if re.search(rf"\b{name}\b", str(refusal))]
        if refusal is not None and not refused:
            raise refusal
        own = (*own, *refused)
        wanted = next((name for name in own if name in asked), None)
        if wanted is not None:
            raise MisuseError(
                f"--{wanted.replace('_', '-')} {asked[wanted]:g}: the server ({api}) does not take it"
                f"{'' if refusal is None else f' ({refusal})'}; leave it out, or use vLLM, SGLang or llama.cpp"
            )
        if refusal is None:
            break
        settings = {name: value for name, value in settings.items() if name not in refused}
    if own:
        logger.warning(
            "the server (%s) does not accept %s: it uses its own, which the card states", api, ", ".join(own)
        )
    elif api == "openai":
        logger.warning("the server does not report its software, so that it may ignore top_k, min_p and the penalties")
    return takes_ids, settings, own


def _asked(
    client: Client, tokenizer: PreTrainedTokenizerBase, model: str, settings: Mapping[str, float], api: str
) -> tuple[bool, RefusedError | None]:
    """Return whether prompts may be token ids, and the refusal if both forms are refused.

    Raises:
        MisuseError: see `agree`.
    """
    prompt = [int(i) for i in tokenizer("The", add_special_tokens=False)["input_ids"]]
    refusal = None
    for form in (prompt, "The"):
        ids = {"return_token_ids": True} if api == "vllm" else {}
        request = {"model": model, "prompt": form, "max_tokens": _PROBED_TOKENS, **settings, **ids}
        try:
            answer = client.submit(PATH, request, lambda found: found, what="a short prompt", size=2).result()
        except RefusedError as error:
            refusal = error
        else:
            _check_text(answer, tokenizer, model)
            return form is prompt, None
    return False, refusal


def _check_text(answer: Any, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else {}
    ids, text = choice.get("token_ids"), choice.get("text")
    if isinstance(ids, list) and isinstance(text, str) and not same_text(tokenizer, ids, text):
        raise MisuseError(
            f"--model: its tokenizer decodes token ids of the server's model {model} to another text than the server "
            f"(which says {text[:40]!r}); name the tokenizer of that model"
        )


def same_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> bool:
    """Return whether token ids decode to the letters and digits of a text.

    Also true if a character is cut in two.
    """
    if any(not 0 <= i < len(tokenizer) for i in ids):
        return False
    own = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    one, other = ("".join(filter(str.isalnum, each)) for each in (own, text))
    return one == other or "\ufffd" in own + text
