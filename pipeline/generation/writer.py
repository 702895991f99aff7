"""The `Writer` protocol of models that generate, end tokens, and the text of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from transformers import GenerationConfig, PreTrainedTokenizerBase

from pipeline.errors import PipelineError
from pipeline.generation.records import Asked, Completion, Prompt, Sampling, ServedModel
from pipeline.records import BadRow, ModelInfo
from pipeline.tasks.chats.templates import REFUSALS, find_template, make_renderer


class Writer(Protocol):
    """A model that generates completions: a local one, or one behind a server."""

    @property
    def name(self) -> str:
        """Name for messages."""

    @property
    def device(self) -> str:
        """The device, as stored in receipts."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion."""

    @property
    def longest(self) -> int:
        """The largest number of tokens of a prompt with its completion."""

    @property
    def num_ids(self) -> int:
        """The model accepts token ids below this."""

    def info(self) -> ModelInfo | ServedModel:
        """The model's entry in the contract."""

    def check(self, prompts: Sequence[Prompt], *, batch_tokens: int) -> None:
        """Check the model with a few short prompts, before the first shard.

        Raises:
            ModelError: completions would depend on their batch.
        """

    def batches(self, lengths: Sequence[int], batch_tokens: int) -> list[tuple[list[int], int]]:
        """Return (indices, padded length) of the completions that are generated together.

        Args:
            lengths: number of tokens of each prompt with its longest completion.
        """

    def write(self, asked: Sequence[Asked], sampling: Sampling) -> list[Completion | BadRow]:
        """Return the completions of one batch, in order, with a bad row where there is none.

        Raises:
            ModelError: out of memory.
            ServerError: no server is available.
        """

    def close(self) -> None:
        """Cancel pending completions and close the connections."""


def end_ids(stated: object, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> tuple[int, ...]:
    """Return the tokens that end a completion.

    Args:
        stated: `eos_token_id` of the model's generation config.
        stops: texts of `--stop`; special tokens among them are end tokens.

    Returns:
        These tokens and EOS of the tokenizer, sorted.
    """
    ids = stated if isinstance(stated, list) else [stated]
    known = [*ids, tokenizer.eos_token_id, *special_stops(tokenizer, stops).values()]
    return tuple(sorted({i for i in known if isinstance(i, int)}))


def special_stops(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> dict[str, int]:
    """Return the texts of `stops` that are exactly one special token, with their ids.

    Decoded completions never contain these texts, because decoding skips special tokens.
    """
    special = _special_tokens(tokenizer)
    return {stop: special[stop] for stop in stops if stop in special}


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that the chat template puts after an assistant turn, or None."""
    said = "softlabel"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]
    try:
        rendered = make_renderer(find_template(tokenizer), (), tokenizer)(turns)[0]
    except (PipelineError, *REFUSALS):
        return None
    behind = tokenizer(rendered.rpartition(said)[2], add_special_tokens=False)["input_ids"]
    special = set(_special_tokens(tokenizer).values())
    return next((int(i) for i in behind if i in special), None)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return text -> id of the tokens that decoding skips."""
    named = set(tokenizer.all_special_ids)
    return {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special or i in named}


def stated_ends(name: str, revision: str | None = None) -> object:
    """Return `eos_token_id` of the generation config next to a tokenizer, or None."""
    try:
        return GenerationConfig.from_pretrained(name, revision=revision or "main").eos_token_id
    except (OSError, ValueError):
        return None


def completion_text(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: np.ndarray, token_ids: np.ndarray, stops: Sequence[str]
) -> tuple[str, bool]:
    """Return the text of a completion up to the first of `stops`, and whether a stop was found.

    It is the text that the tokens add to the text of the prompt, without special tokens: some
    tokenizers drop the space at the beginning of a text.
    """
    before = _decoded(tokenizer, prompt_ids[-_CONTEXT:])
    whole = _decoded(tokenizer, np.concatenate([prompt_ids[-_CONTEXT:], token_ids]))
    text = whole[len(before) :] if whole.startswith(before) else _decoded(tokenizer, token_ids)
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


#: Number of prompt tokens decoded with a completion, which determine the space between them.
_CONTEXT = 8


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))
