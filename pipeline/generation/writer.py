"""Who writes completions: the interface, and what makes of token ids the text of a completion."""

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
    """A model that writes: a local one, or that of a server."""

    @property
    def name(self) -> str:
        """As messages name it."""

    @property
    def device(self) -> str:
        """As receipts name it."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion."""

    @property
    def longest(self) -> int:
        """The most tokens of a prompt with its completion."""

    @property
    def num_ids(self) -> int:
        """Token ids below this can be read."""

    def info(self) -> ModelInfo | ServedModel:
        """For the contract."""

    def check(self, prompts: Sequence[Prompt], *, batch_tokens: int) -> None:
        """Before the first shard, with a few short prompts.

        Raises:
            ModelError: its batches cannot be trusted.
        """

    def batches(self, lengths: Sequence[int], batch_tokens: int) -> list[tuple[list[int], int]]:
        """Which completions are written together: row numbers, and the padded length.

        Args:
            lengths: tokens of each prompt with its longest completion.
        """

    def write(self, asked: Sequence[Asked], sampling: Sampling) -> list[Completion | BadRow]:
        """The completions of one batch, in order; a bad row where there is none.

        Raises:
            ModelError: out of memory.
            ServerError: no server can be used.
        """

    def close(self) -> None:
        """Give up what is not written yet, and every connection."""


def end_ids(stated: object, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> tuple[int, ...]:
    """The tokens that end a completion.

    Args:
        stated: `eos_token_id` of a model's generation config.
        stops: `--stop`; those that are special tokens are among the ends.

    Returns:
        These and EOS of the tokenizer, in order.
    """
    ids = stated if isinstance(stated, list) else [stated]
    known = [*ids, tokenizer.eos_token_id, *special_stops(tokenizer, stops).values()]
    return tuple(sorted({i for i in known if isinstance(i, int)}))


def special_stops(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> dict[str, int]:
    """The texts among `stops` that are exactly one special token, with its id: no decoded completion holds them."""
    special = _special_tokens(tokenizer)
    return {stop: special[stop] for stop in stops if stop in special}


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts behind a turn of the assistant; None where there is none."""
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
    """Text -> id of the tokens that decoding leaves out."""
    named = set(tokenizer.all_special_ids)
    return {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special or i in named}


def stated_ends(name: str, revision: str | None = None) -> object:
    """`eos_token_id` of a generation config beside a tokenizer; None where there is none."""
    try:
        return GenerationConfig.from_pretrained(name, revision=revision or "main").eos_token_id
    except (OSError, ValueError):
        return None


def completion_text(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: np.ndarray, token_ids: np.ndarray, stops: Sequence[str]
) -> tuple[str, bool]:
    """The text that goes on from the prompt, without special tokens, up to the first of `stops`; and whether one was found.

    It is what the tokens add to the text of the prompt: some tokenizers drop the space that the
    first token of a text begins with.
    """
    before = _decoded(tokenizer, prompt_ids[-_CONTEXT:])
    whole = _decoded(tokenizer, np.concatenate([prompt_ids[-_CONTEXT:], token_ids]))
    text = whole[len(before) :] if whole.startswith(before) else _decoded(tokenizer, token_ids)
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


#: Tokens of the prompt that are decoded with a completion: enough to know the space between them.
_CONTEXT = 8


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))
