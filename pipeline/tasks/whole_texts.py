"""What tasks on texts and pairs of texts share: one vector of logits per row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from pipeline.errors import MisuseError
from pipeline.records import BadRow, Columns, Cut, Example, TokenBlock, Tokenization, TokenizedExample
from pipeline.tasks.defaults import TaskDefaults
from pipeline.tasks.protocol import (
    attention_mask,
    embedding_rows,
    free_pad_id,
    kept_pad_id,
    pad,
    refuse_settings_of_language_models,
    token_block,
)

_BATCH = 1000


@dataclass(frozen=True, slots=True)
class TextTask(TaskDefaults):
    """Base of the tasks on texts and pairs of texts: tokenization, collation and forward pass."""

    auto_class: Any = AutoModelForSequenceClassification
    peft_type: str | None = "SEQ_CLS"
    hub_category: str = "text-classification"

    def check_columns(self, columns: Columns, tokenization: Tokenization) -> None:
        """Accept only texts and pairs of texts."""
        if columns.text is None:
            raise MisuseError(
                f"--task {self.name} reads --text-column (and --text-pair-column); words, chats, prompts and token ids are for other tasks"
            )
        refuse_settings_of_language_models(self.name, tokenization, "texts, and keeps their beginning")

    def tokenize(
        self,
        examples: Iterable[Example | BadRow],
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: Tokenization,
        *,
        texts: bool = False,
    ) -> Iterator[TokenizedExample | BadRow]:
        """Truncate texts to `max_length` tokens, as `transformers` does.

        The `text` of a row stays complete.
        """

        def tokenized(chunk: Sequence[Example]) -> Iterator[TokenizedExample]:
            return _tokenize(chunk, tokenizer, settings.max_length, self.labels_of)

        return in_chunks(tokenized, examples, _BATCH)

    def labels_of(self, example: Example) -> Mapping[str, Any]:
        """Return the hard labels of an example, as arguments of `TokenizedExample`."""
        return {"label": example.label}

    def collate(
        self,
        rows: TokenBlock | Sequence[TokenizedExample],
        pad_id: int,
        length: int | None = None,
        *,
        processor: Any = None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Pad on the right."""
        return collate_texts(rows, pad_id, length), None

    def gather_logits(self, model: nn.Module, inputs: Mapping[str, Tensor], supervised: Tensor | None) -> Tensor:
        """Return (N, V) logits, the same as if each row were passed to the model alone."""
        return self.at_positions(row_logits(model, inputs), None)


def in_chunks(
    function: Callable[[Sequence[Example]], Iterable[TokenizedExample | BadRow]],
    items: Iterable[Example | BadRow],
    size: int,
) -> Iterator[TokenizedExample | BadRow]:
    """Apply a function that makes one row per example to chunks of `size` items.

    The rows stay in order; bad rows keep their place.
    """
    iterator = iter(items)
    while chunk := tuple(itertools.islice(iterator, size)):
        good = [item for item in chunk if isinstance(item, Example)]
        rows = iter(function(good) if good else ())
        for item in chunk:
            yield item if isinstance(item, BadRow) else next(rows)


def _tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    label: Callable[[Example], Mapping[str, Any]],
) -> Iterator[TokenizedExample]:
    texts = [e.text or "" for e in examples]
    pairs = None if examples[0].text_pair is None else [e.text_pair or "" for e in examples]
    encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length, return_attention_mask=False)
    types = encoded.get("token_type_ids")
    lengths = [len(ids) for ids in encoded["input_ids"]]
    lost = lost_tokens(texts, pairs, lengths, tokenizer, max_length)
    for i, example in enumerate(examples):
        yield TokenizedExample(
            source_row=example.source_row,
            piece=0,
            input_ids=np.asarray(encoded["input_ids"][i], dtype=np.int32),
            token_type_ids=None if types is None else np.asarray(types[i], dtype=np.int32),
            text=example.text,
            text_pair=example.text_pair,
            group=example.group,
            kept=example.kept,
            cut=(Cut(example.source_row, lost[i]),) if lost[i] else (),
            **label(example),
        )


def collate_texts(rows: TokenBlock | Sequence[TokenizedExample], pad_id: int, length: int | None) -> dict[str, Tensor]:
    """Pad token ids, attention mask and token types on the right; each is (B, T) int64."""
    tokens = token_block(rows)
    inputs = {
        "input_ids": pad(tokens.input_ids, pad_id, length),
        "attention_mask": attention_mask(tokens.input_ids, length),
    }
    if tokens.token_type_ids is not None:
        inputs["token_type_ids"] = pad(tokens.token_type_ids, 0, length)
    return inputs


def row_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return (B, labels) logits, the same as if each row were passed to the model alone.

    Decoder-only classifiers of `transformers` use the last token that is not
    `config.pad_token_id`, so rows are padded with that id. If the configuration has no such id, or
    one without an input embedding, the model uses the last token of a row passed alone. Then this
    function sets `config.pad_token_id`, for this forward pass only, to an id that no row of the
    batch ends with, and pads with it.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    kept = kept_pad_id(model)
    if kept is not None:
        logits: Tensor = model(**{**inputs, "input_ids": ids.masked_fill(~mask, kept)}).logits
        return logits
    last = (mask * torch.arange(ids.shape[1], device=ids.device)).argmax(-1, keepdim=True)  # (B, 1)
    free = free_pad_id(ids.gather(1, last).flatten().tolist(), embedding_rows(model))
    if free is None:  # the batch's last tokens include the whole vocabulary
        rows = [{name: tensor[i : i + 1] for name, tensor in inputs.items()} for i in range(len(ids))]
        return torch.cat([row_logits(model, row) for row in rows])
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    before, config.pad_token_id = config.pad_token_id, free
    try:
        logits = model(**{**inputs, "input_ids": ids.masked_fill(~mask, free)}).logits
    finally:
        config.pad_token_id = before
    return logits


def lost_tokens(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    lengths: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[int]:
    """Return how many tokens each text or pair of texts has lost to truncation.

    Args:
        lengths: number of tokens of each after truncation.
    """
    lost = [0] * len(texts)
    full = [i for i, length in enumerate(lengths) if length >= max_length]
    if full:
        second = None if pairs is None else [pairs[i] for i in full]
        whole = tokenizer([texts[i] for i in full], second, truncation=False, verbose=False)["input_ids"]
        for i, ids in zip(full, whole, strict=True):
            lost[i] = len(ids) - lengths[i]
    return lost
