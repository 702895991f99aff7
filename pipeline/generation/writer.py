"""Who writes completions: the interface, and what makes of token ids the text of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.generation.records import Asked, Completion, Prompt, Sampling, ServerInfo
from pipeline.records import ModelInfo


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

    def info(self) -> ModelInfo | ServerInfo:
        """For the contract."""

    def check(self, prompts: Sequence[Prompt], *, batch_tokens: int) -> None:
        """Before the first shard, with a few short prompts.

        Raises:
            ModelError: its batches cannot be trusted.
        """

    def write(self, asked: Sequence[Asked], sampling: Sampling) -> list[Completion]:
        """The completions of one batch, in order.

        Raises:
            ModelError: out of memory, or logits that are not finite.
        """


def completion_text(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: np.ndarray, token_ids: np.ndarray, stops: Sequence[str]
) -> tuple[str, bool]:
    """The text that goes on from the prompt, without special tokens, up to the first of `stops`; and whether one was found.

    It is what the tokens add to the text of the prompt: some tokenizers drop the space that the first token of a text
    begins with.
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
