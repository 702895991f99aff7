"""Rows that are whole texts or pairs of texts, of which a model gives one vector of logits each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pipeline.records import BadRow, Cut, Example, TokenBlock, TokenizedExample
from pipeline.tasks.protocol import attention_mask, embedding_rows, free_pad_id, kept_pad_id, pad, token_block

_BATCH = 1000


def tokenize_texts(
    examples: Iterable[Example | BadRow],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    label: Callable[[Example], Mapping[str, Any]],
) -> Iterator[TokenizedExample | BadRow]:
    """Texts longer than `max_length` are truncated, as `transformers` does; each row has its whole text in any case.

    Args:
        label: the hard labels of an example, as arguments of `TokenizedExample`.
    """
    for chunk in _batched(examples):
        good = [item for item in chunk if isinstance(item, Example)]
        tokens = iter(_tokenize(good, tokenizer, max_length, label)) if good else iter(())
        for item in chunk:
            yield item if isinstance(item, BadRow) else next(tokens)


def _tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    label: Callable[[Example], Mapping[str, Any]],
) -> Iterator[TokenizedExample]:
    paired = examples[0].text_pair is not None
    encoded = tokenizer(
        [e.text or "" for e in examples],
        [e.text_pair or "" for e in examples] if paired else None,
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
    )
    types = encoded.get("token_type_ids")
    lengths = [len(ids) for ids in encoded["input_ids"]]
    whole = _whole_lengths(examples, lengths, tokenizer, max_length)
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
            cut=(Cut(example.source_row, whole[i] - lengths[i]),) if whole.get(i, 0) > lengths[i] else (),
            **label(example),
        )


def collate_texts(rows: TokenBlock | Sequence[TokenizedExample], pad_id: int, length: int | None) -> dict[str, Tensor]:
    """Padded on the right."""
    tokens = token_block(rows)
    inputs = {
        "input_ids": pad(tokens.input_ids, pad_id, length),
        "attention_mask": attention_mask(tokens.input_ids, length),
    }
    if tokens.token_type_ids is not None:
        inputs["token_type_ids"] = pad(tokens.token_type_ids, 0, length)
    return inputs


def row_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, labels): the logits of each row, as the model gives them for the row alone.

    Decoder-only classifiers of `transformers` take the last token that is not `config.pad_token_id`. Padded with that id, a row ends where it
    ends alone. Where the configuration has none, or one without an embedding, the model takes the last token of a row alone; for this one pass
    the configuration gets an id that no row of the batch ends with, and padding is made of it.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    kept = kept_pad_id(model)
    if kept is not None:
        logits: Tensor = model(**{**inputs, "input_ids": ids.masked_fill(~mask, kept)}).logits
        return logits
    last = (mask * torch.arange(ids.shape[1], device=ids.device)).argmax(-1, keepdim=True)  # (B, 1)
    free = free_pad_id(ids.gather(1, last).flatten().tolist(), embedding_rows(model))
    if free is None:  # a batch of more rows than the vocabulary has tokens
        rows = [{name: tensor[i : i + 1] for name, tensor in inputs.items()} for i in range(len(ids))]
        return torch.cat([row_logits(model, row) for row in rows])
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    before, config.pad_token_id = config.pad_token_id, free
    try:
        logits = model(**{**inputs, "input_ids": ids.masked_fill(~mask, free)}).logits
    finally:
        config.pad_token_id = before
    return logits


def _whole_lengths(
    examples: Sequence[Example], lengths: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[int, int]:
    """Number of an example -> its tokens before truncation, of those that are as long as is allowed."""
    full = [i for i, length in enumerate(lengths) if length >= max_length]
    if not full:
        return {}
    pairs = [examples[i].text_pair or "" for i in full] if examples[0].text_pair is not None else None
    encoded = tokenizer([examples[i].text or "" for i in full], pairs, truncation=False, verbose=False)
    return {i: len(ids) for i, ids in zip(full, encoded["input_ids"], strict=True)}


def _batched(items: Iterable[Example | BadRow]) -> Iterator[tuple[Example | BadRow, ...]]:
    iterator = iter(items)
    while chunk := tuple(itertools.islice(iterator, _BATCH)):
        yield chunk
