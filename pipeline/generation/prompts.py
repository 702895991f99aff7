"""Rows of a data set as prompts: texts, chats, or the first tokens of the texts of a corpus."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.capture.plan import ranges_of
from pipeline.config import GenerateConfig
from pipeline.config.data import chat_template_kwargs
from pipeline.errors import BadRowError, MisuseError, SourceError
from pipeline.generation.records import Prompt, PromptSettings
from pipeline.records import BadRow, Columns, Example, Message
from pipeline.sources import Source, from_datasets, holds_chats, load_source, read_examples
from pipeline.sources.columns import describe
from pipeline.sources.prepare import locate
from pipeline.tasks.chats import render_prompt
from pipeline.tasks.chats.templates import CLOCK, DAY, find_template
from pipeline.tasks.pieces import Vocabulary, read_vocabulary

logger = logging.getLogger(__name__)

#: Start of the reason of rows that are always skipped, regardless of `--on-bad-row`: short texts
#: are normal in a corpus.
TOO_SHORT = "shorter than --prefix-tokens"


class Prompts(Protocol):
    """A source of prompts."""

    @property
    def settings(self) -> PromptSettings:
        """The settings of the prompts, for the contract."""

    @property
    def source(self) -> Source | None:
        """The data set with the prompts, or None."""

    @property
    def ranges(self) -> Mapping[str, tuple[int, int]]:
        """Split -> its rows `[start, stop)`."""

    def read(self, split: str, start: int, stop: int) -> Iterator[Prompt | BadRow]:
        """Yield one item per row of `[start, stop)`, in order."""


@dataclass(frozen=True, slots=True)
class RowPrompts:
    """One prompt per row of a data set; see `Prompts`."""

    source: Source
    ranges: Mapping[str, tuple[int, int]]
    settings: PromptSettings
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary

    def read(self, split: str, start: int, stop: int) -> Iterator[Prompt | BadRow]:
        """Yield the prompts; rows that cannot be prompts become bad rows."""
        for item in read_examples(self.source, split, start, stop, None):
            if isinstance(item, BadRow):
                yield item
                continue
            try:
                yield self._prompt(item)
            except BadRowError as error:
                yield BadRow(split, item.source_row, str(error))

    def _prompt(self, example: Example) -> Prompt:
        if self.settings.kind == "prefixes":
            text, ids = _prefix(example.text or "", self.settings.prefix_tokens or 0, self.vocabulary)
        elif self.settings.kind == "chats":
            text = chat_text(example, self.settings, self.tokenizer)
            ids = chat_ids(text, self.tokenizer)
        else:
            text, ids = text_prompt(example.text or "", self.settings, self.tokenizer, self.vocabulary)
        return Prompt(example.source_row, text, ids, kept=example.kept, is_chat=self.settings.are_chats)


def row_prompts(config: GenerateConfig, tokenizer: PreTrainedTokenizerBase, *, live: Any = None) -> RowPrompts:
    """Build the prompts that the flags select.

    Args:
        live: a `datasets.Dataset`, or a mapping of them, instead of `--dataset`.

    Raises:
        SourceError: there is no such data set, or no column with prompts.
        MisuseError: settings that do not fit these prompts.
    """
    features = _features(live if live is not None else locate(config.data()).splits)
    role, column = _column(config, features)
    columns = Columns(
        text=column if role == "text" else None,
        messages=column if role == "messages" else None,
        label=None,
        keep=config.keep_column,
    )
    if live is not None:
        source = from_datasets(live, columns, splits=config.split)
    else:
        named = {"text_column" if role == "text" else "messages_column": column}
        source = load_source(dataclasses.replace(config.data(**named), keep_column=config.keep_column))
        source = dataclasses.replace(source, columns=dataclasses.replace(source.columns, label=None))
    chats = holds_chats(source)
    if config.as_chat and chats:
        raise MisuseError(f"--as-chat needs prompts that are text, and the column {column!r} holds chats")
    if config.chat_template_kwargs and not (chats or config.as_chat):
        raise MisuseError("--chat-template-kwargs goes with chats, or with --as-chat")
    settings = PromptSettings(
        kind="chats" if chats else "texts" if config.prefix_tokens is None else "prefixes",
        as_chat=config.as_chat,
        chat_template_kwargs=template_kwargs(config, tokenizer) if chats or config.as_chat else (),
        prefix_tokens=config.prefix_tokens,
    )
    if settings.kind == "texts" and not config.as_chat and tokenizer.chat_template is not None:
        logger.info(
            "the prompts are plain texts, which the model continues; the tokenizer has a chat template: --as-chat makes "
            "each a turn of the user"
        )
    ranges = ranges_of(source, config.row_range)
    _tell_of_fewer(source.name, config.row_range, ranges)
    return RowPrompts(source, ranges, settings, tokenizer, read_vocabulary(tokenizer))


def _tell_of_fewer(name: str, asked: tuple[int, int | None] | None, ranges: Mapping[str, tuple[int, int]]) -> None:
    """Warn if no split has as many rows as `--rows` requests.

    Repeated runs over successive row ranges then run out of prompts.
    """
    start, stop = asked or (0, None)
    split, (_, last) = max(ranges.items(), key=lambda item: item[1][1])
    if stop is not None and last < stop:
        logger.warning(
            "%s: --rows %d:%d: split %s has %s rows, so that there are %s prompts instead of %s",
            *(name, start, stop, split, f"{last:,}", f"{last - start:,}", f"{stop - start:,}"),
        )


def template_kwargs(config: GenerateConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the arguments of the chat template, with the date if the template uses it.

    The date stays fixed, because a run may be resumed on another day.
    """
    kwargs = chat_template_kwargs(config.chat_template_kwargs)
    pinned = any(item.startswith(f"{CLOCK}=") for item in kwargs)
    if pinned or not find_template(tokenizer).asks_the_date:
        return kwargs
    return tuple(sorted([*kwargs, f"{CLOCK}={json.dumps(DAY)}"]))


def text_prompt(
    text: str, settings: PromptSettings, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary
) -> tuple[str, np.ndarray]:
    """Return a text as the model reads it (plain, or as a user turn) and its token ids."""
    if not settings.as_chat:
        return text, _opened(text, vocabulary)
    example = Example(0, messages=(Message("user", text),))
    rendered = chat_text(example, settings, tokenizer)
    return rendered, chat_ids(rendered, tokenizer)


def chat_text(example: Example, settings: PromptSettings, tokenizer: PreTrainedTokenizerBase) -> str:
    """Render the turns of a chat up to the next turn of the assistant.

    Raises:
        BadRowError: no turn is left, or the template refuses the turns.
    """
    messages = list(example.messages or ())
    while messages and messages[-1].role == "assistant":
        messages.pop()
    if not messages:
        raise BadRowError("expected a turn before the assistant's, found none")
    return render_prompt(
        dataclasses.replace(example, messages=tuple(messages)), tokenizer, settings.chat_template_kwargs
    )


def chat_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return the (T,) int32 token ids of a rendered chat, which contains its special tokens.

    If both the template and the first turn begin with BOS, one of the two is removed.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    twice = len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id
    return np.asarray(ids[1:] if twice else ids, dtype=np.int32)


def _opened(text: str, vocabulary: Vocabulary) -> np.ndarray:
    ids, num_bytes, _ = vocabulary.encode(text)
    return np.asarray(vocabulary.open(ids, num_bytes)[0], dtype=np.int32)


def _prefix(text: str, count: int, vocabulary: Vocabulary) -> tuple[str, np.ndarray]:
    """Return the first `count` tokens of a text: the characters that they cover, and the ids.

    The ids begin with the special tokens that the tokenizer puts before a text.

    Raises:
        BadRowError: the text has fewer tokens.
    """
    ids, num_bytes, offsets = vocabulary.encode(text)
    if len(ids) < count:
        raise BadRowError(f"{TOO_SHORT}: expected at least {count} tokens, found {len(ids)}")
    head = ids[:count]
    shown = text[: offsets[count - 1][1]] if offsets else str(vocabulary.tokenizer.decode(head.tolist()))
    return shown, np.asarray(vocabulary.open(head, num_bytes[:count])[0], dtype=np.int32)


def _features(splits: Any) -> Mapping[str, Any]:
    """Return column -> type of the first split."""
    rows = next(iter(splits.values()), None) if isinstance(splits, Mapping) else splits
    found = getattr(rows, "features", None)
    return dict(found) if found else {}


def _column(config: GenerateConfig, features: Mapping[str, Any]) -> tuple[str, str]:
    """Return the role (`text` or `messages`) and the name of the column with the prompts.

    Raises:
        SourceError: no column is named, and none has a default name.
    """
    if config.prefix_tokens is not None:
        return "text", config.text_column or "text"
    name = config.prompt_column or ("prompt" if "prompt" in features and config.messages_column is None else None)
    if name is not None:
        return ("text" if name not in features or describe(features[name]) == "text" else "messages"), name
    name = config.messages_column or ("messages" if "messages" in features else None)
    if name is not None:
        return "messages", name
    raise SourceError(
        f"{config.dataset or 'in-memory'}: no column 'prompt' or 'messages'; found {', '.join(features) or 'none'}; name the "
        "column with --prompt-column or --messages-column, or take the beginning of each text with --prefix-tokens N"
    )
