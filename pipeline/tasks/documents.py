"""Example -> Document: token ids, which of them are to be predicted, and the bytes of text that each stands for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.errors import SourceError
from pipeline.records import NO_LABEL, BadRow, Example


@dataclass(frozen=True, slots=True)
class Document:
    """One source row as tokens. `predicted[j]`: token j is to be predicted, from position j - 1."""

    example: Example
    input_ids: np.ndarray
    """(T,) int32."""
    predicted: np.ndarray
    """(T,) bool; the first is False, since nothing stands before it."""
    num_bytes: np.ndarray
    """(T,) int64."""

    @property
    def may_be_cut(self) -> bool:
        """Whether every token is to be predicted, so that a later piece has lost nothing but context."""
        example = self.example
        return example.text is not None or (example.input_ids is not None and example.token_labels is None)

    def part(self, start: int, stop: int) -> Document:
        """Tokens `[start, stop)`; the first of them has been predicted before, or never is."""
        predicted = self.predicted[start:stop].copy()
        predicted[:1] = False
        return Document(self.example, self.input_ids[start:stop], predicted, self.num_bytes[start:stop])

    def with_eos(self, eos_id: int) -> Document:
        """Closed by EOS, which is to be predicted where all of the text is."""
        if self.input_ids[-1] == eos_id:
            return self
        return Document(
            self.example,
            np.append(self.input_ids, np.int32(eos_id)),
            np.append(self.predicted, self.may_be_cut),
            np.append(self.num_bytes, 0),
        )


def read_documents(
    examples: Iterable[Example | BadRow], split: str, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Document | BadRow]:
    """Tokenize each example by the kind of its input, at its full length.

    Raises:
        SourceError: the chat template does not mark the assistant's tokens.
    """
    for example in examples:
        if isinstance(example, BadRow):
            yield example
            continue
        try:
            document = _tokenize(example, tokenizer)
        except jinja2.TemplateError as error:  # a template that wants turns to alternate, for one
            yield BadRow(split, example.source_row, f"the chat template refuses it: {error}")
            continue
        if len(document.input_ids) and int(document.input_ids.max()) >= len(tokenizer):
            yield BadRow(
                split,
                example.source_row,
                f"expected token ids below {len(tokenizer)}, found {int(document.input_ids.max())}",
            )
            continue
        if len(document.input_ids) < 2:
            yield BadRow(split, example.source_row, f"expected at least 2 tokens, found {len(document.input_ids)}")
        elif not document.predicted.any():
            yield BadRow(split, example.source_row, "expected a token to predict, found none")
        else:
            yield document


def _tokenize(example: Example, tokenizer: PreTrainedTokenizerBase) -> Document:
    if example.messages is not None:
        return _from_chat(example, tokenizer)
    if example.prompt_completion is not None:
        return _from_prompt(example, tokenizer)
    if example.input_ids is not None:
        ids = np.asarray(example.input_ids, dtype=np.int32)
        labels = np.asarray(example.token_labels if example.token_labels is not None else example.input_ids)
        return _document(example, tokenizer, ids, labels != NO_LABEL, None)
    text = example.text or ""
    encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast)
    ids = np.asarray(encoded["input_ids"], dtype=np.int32)
    num_bytes = _bytes_by_offset(text, encoded["offset_mapping"]) if tokenizer.is_fast else None
    return _document(example, tokenizer, ids, np.ones(len(ids), dtype=bool), num_bytes)


def _from_chat(example: Example, tokenizer: PreTrainedTokenizerBase) -> Document:
    template = tokenizer.chat_template
    if not isinstance(template, str) or "generation" not in template.replace("add_generation_prompt", ""):
        raise SourceError(
            "the tokenizer's chat template does not mark the assistant's tokens with {% generation %} ... {% endgeneration %}; "
            "give one that does with --chat-template FILE.jinja (the README shows how)"
        )
    messages = [{"role": m.role, "content": m.content} for m in example.messages or ()]
    encoded: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = np.asarray(encoded["input_ids"], dtype=np.int32)
    mask = np.asarray(encoded["assistant_masks"], dtype=bool)
    return _document(example, tokenizer, ids, mask, None)


def _from_prompt(example: Example, tokenizer: PreTrainedTokenizerBase) -> Document:
    """Prompt and completion are tokenized apart, so that no token straddles the border; EOS ends the completion."""
    prompt, completion = example.prompt_completion or ("", "")
    before = list(tokenizer(prompt)["input_ids"])
    if before and before[-1] == tokenizer.eos_token_id:  # some tokenizers close what they are given
        before.pop()
    after = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id is not None:
        after.append(tokenizer.eos_token_id)
    ids = np.asarray(before + after, dtype=np.int32)
    return _document(example, tokenizer, ids, np.arange(len(ids)) >= len(before), None)


def _document(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    ids: np.ndarray,
    predicted: np.ndarray,
    num_bytes: np.ndarray | None,
) -> Document:
    predicted = predicted.copy()
    predicted[:1] = False
    if num_bytes is None:
        num_bytes = _bytes_by_decoding(tokenizer, ids)
    return Document(example, ids, predicted, num_bytes)


def _bytes_by_offset(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Bytes from the end of the token before to the end of this one: white space between tokens counts once."""
    position = np.zeros(len(text) + 1, dtype=np.int64)  # character -> byte
    code = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    position[1:] = np.cumsum(1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000))
    ends = np.maximum.accumulate(np.asarray([end for _, end in offsets], dtype=np.int64))
    return np.diff(position[ends], prepend=0)


def _bytes_by_decoding(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> np.ndarray:
    """Bytes of each token decoded by itself; special tokens stand for no text."""
    special = set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[int(i)] for i in ids], clean_up_tokenization_spaces=False)
    return np.asarray(
        [0 if int(i) in special else len(text.encode("utf-8", "replace")) for i, text in zip(ids, texts, strict=True)],
        dtype=np.int64,
    )
