"""Tokenize examples into documents: token ids, which of them are predicted, and text bytes."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.errors import BadRowError, SourceError
from pipeline.records import NO_LABEL, BadRow, Cut, Example, Tokenization
from pipeline.tasks.chats import render_chat
from pipeline.tasks.chats.turns import Rendered, control_tokens
from pipeline.tasks.pieces import Vocabulary, read_vocabulary
from pipeline.tasks.texts import Conversation, Covered, Index

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Document:
    """The tokens of one source row, or of one of the several rows that a chat becomes.

    `predicted[j]`: whether token j is predicted, at position j - 1.
    """

    example: Example
    input_ids: np.ndarray
    """(T,) int32."""
    predicted: np.ndarray
    """(T,) bool; the first is False, since no token precedes it."""
    num_bytes: np.ndarray
    """(T,) int64: UTF-8 bytes of text that each token stands for."""
    is_closed: bool = False
    """Whether the document ends with EOS; white space may follow the EOS."""
    piece: int = 0
    """Number of the row among the rows of its chat."""
    split_chat: int = 0
    """Number of rows of the chat, on the first of several rows; else 0."""
    cut: Cut | None = None
    """What truncation has removed."""
    covered: Covered | None = None
    """The characters of each token, if texts are kept."""
    conversation: Conversation | None = None
    """The turns of a chat, if they are kept."""

    @property
    def may_be_cut(self) -> bool:
        """Whether the document may be divided into pieces.

        True if every token is predicted: a later piece then lacks only context.
        """
        example = self.example
        return example.text is not None or (example.input_ids is not None and example.token_labels is None)

    def part(self, start: int, stop: int) -> Document:
        """Return the document of tokens `[start, stop)`.

        The first token is not predicted: the part before predicts it, or no token precedes it.
        """
        predicted = self.predicted[start:stop].copy()
        predicted[:1] = False
        return dataclasses.replace(
            self,
            input_ids=self.input_ids[start:stop],
            predicted=predicted,
            num_bytes=self.num_bytes[start:stop],
            is_closed=False,
            split_chat=0 if start else self.split_chat,
            cut=None if start else self.cut,
            **self._origin(slice(start, stop)),
        )

    def truncated(self, longest: int, *, left: bool, bos_id: int | None) -> Document:
        """Truncate the document to `longest` tokens.

        Args:
            left: keep the last tokens, after BOS if the document begins with it. The first of
                those has lost its context and is not predicted. Otherwise keep the first tokens.
        """
        rest = np.arange(len(self.input_ids))
        opening = int(left and longest > 2 and self.input_ids[0] == bos_id)
        kept = np.concatenate([rest[:opening], rest[opening - longest :]]) if left else rest[:longest]
        predicted = self.predicted[kept]
        predicted[: opening + 1 if left else 1] = False
        lost = Cut(self.example.source_row, len(rest) - longest, int(self.predicted.sum() - predicted.sum()))
        return dataclasses.replace(
            self,
            input_ids=self.input_ids[kept],
            predicted=predicted,
            num_bytes=self.num_bytes[kept],
            cut=lost,
            **self._origin(kept),
        )

    def _origin(self, index: Index) -> dict[str, Any]:
        """Return `covered` and `conversation` for some of the tokens."""
        return {
            "covered": None if self.covered is None else self.covered.take(index),
            "conversation": None if self.conversation is None else self.conversation.take(index),
        }

    def with_eos(self, eos_id: int) -> Document:
        """Append EOS, unless the document has one; it is predicted if every token is."""
        if self.is_closed or self.input_ids[-1] == eos_id:
            return self
        return dataclasses.replace(
            self,
            input_ids=np.append(self.input_ids, np.int32(eos_id)),
            predicted=np.append(self.predicted, self.may_be_cut),
            num_bytes=np.append(self.num_bytes, 0),
        )


def read_documents(
    examples: Iterable[Example | BadRow],
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: Tokenization,
    *,
    texts: bool = False,
) -> Iterator[Document | BadRow]:
    """Tokenize each example according to its kind of input, without truncation.

    A chat may become several documents. A warning counts the rows of token ids that begin or end
    with supervised padding.

    Args:
        texts: keep the text or the turns of each document; this needs a fast tokenizer.

    Raises:
        SourceError: the examples are chats, and the tokenizer has no chat template or is not fast.
        MisuseError: the chat template does not read one of the arguments given.
    """
    vocabulary, control = read_vocabulary(tokenizer), control_tokens(tokenizer)
    rows = padded = 0
    for example in examples:
        rows += 1
        if isinstance(example, BadRow):
            yield example
            continue
        try:
            documents = _tokenize(example, vocabulary, settings, control, texts)
        except BadRowError as error:
            yield BadRow(split, example.source_row, str(error))
            continue
        for document in documents:
            padded += example.input_ids is not None and _learns_padding(document, tokenizer.pad_token_id)
            problem = _problem(document, len(tokenizer))
            yield document if problem is None else BadRow(split, example.source_row, problem)
    if padded and rows > 1:  # a single row is only a trial, so it needs no warning
        logger.warning(
            "split %s: %d of %d rows begin or end with the pad token %d, which is trained on like any other; add a "
            "column attention_mask that is 0 there, or labels of %d",
            split,
            padded,
            rows,
            tokenizer.pad_token_id,
            NO_LABEL,
        )


def _problem(document: Document, vocabulary_size: int) -> str | None:
    """Return the reason that a document cannot be a row; None: it can."""
    ids = document.input_ids
    if len(ids) and int(ids.max()) >= vocabulary_size:
        return f"expected token ids below {vocabulary_size}, found {int(ids.max())}"
    if len(ids) < 2:
        return f"expected at least 2 tokens, found {len(ids)}"
    return None if document.predicted.any() else "expected a token to predict, found none"


def _learns_padding(document: Document, pad_id: int | None) -> bool:
    """Return whether the first or last two tokens are padding and one of the two is predicted."""
    ends = (slice(0, 2), slice(-2, None))
    return any(bool((document.input_ids[end] == pad_id).all() and document.predicted[end].any()) for end in ends)


def _tokenize(
    example: Example, vocabulary: Vocabulary, settings: Tokenization, control: re.Pattern[str], texts: bool
) -> list[Document]:
    if example.messages is not None:
        return _from_chat(example, vocabulary, settings, control, texts)
    if example.prompt_completion is not None:
        return [_from_prompt(example, vocabulary, texts)]
    if example.input_ids is not None:
        ids = np.asarray(example.input_ids, dtype=np.int32)
        labels = np.asarray(example.token_labels if example.token_labels is not None else example.input_ids)
        return [_document(example, ids, labels != NO_LABEL, vocabulary.bytes_of_ids(ids))]
    text = example.text or ""
    bare, num_bytes, offsets = vocabulary.encode(text)
    opened, ids = vocabulary.open(bare, num_bytes)[0], bare
    ids, num_bytes = vocabulary.enclose(bare, num_bytes)
    document = _document(example, ids, np.ones(len(ids), dtype=bool), num_bytes)
    return [_covering(document, Covered.of(text, offsets), len(opened) - len(bare)) if texts else document]


def _from_chat(
    example: Example, vocabulary: Vocabulary, settings: Tokenization, control: re.Pattern[str], texts: bool
) -> list[Document]:
    tokenizer = vocabulary.tokenizer
    rows = render_chat(example, tokenizer, settings, control)
    if not tokenizer.is_fast:
        raise SourceError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: chats need a fast tokenizer, which has the character offsets of each "
            "token; give token ids with --input-ids-column"
        )
    several = len(rows) if len(rows) > 1 and settings.assistant_turns in (None, "auto") else 0
    return [
        dataclasses.replace(
            _from_text(example, row, vocabulary, texts), piece=piece, split_chat=0 if piece else several
        )
        for piece, row in enumerate(rows)
    ]


def _from_text(example: Example, row: Rendered, vocabulary: Vocabulary, texts: bool) -> Document:
    tokenizer = vocabulary.tokenizer
    ids, num_bytes, offsets = vocabulary.encode(row.text)
    learnt = overlapping(offsets, row.spans)
    # The text has two BOS if both the template and the first turn begin with one.
    twice = int(len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id)
    ends = tokenizer.eos_token is not None and row.text.rstrip().endswith(str(tokenizer.eos_token))
    document = _document(example, ids[twice:], learnt[twice:], num_bytes[twice:])
    conversation = _conversation(example, row, offsets, learnt).take(slice(twice, None)) if texts else None
    return dataclasses.replace(document, is_closed=ends, conversation=conversation)


def _conversation(
    example: Example, row: Rendered, offsets: Sequence[tuple[int, int]], learnt: np.ndarray
) -> Conversation:
    """Return the turns of a row, with the turn that each supervised token belongs to."""
    turn_of: np.ndarray | None = np.full(len(learnt), -1, dtype=np.int64)
    assert turn_of is not None
    if len(row.numbers) == 1:
        turn_of[learnt] = row.numbers[0]
    elif len(row.numbers) == len(row.spans):
        for number, span in zip(row.numbers, row.spans, strict=True):
            turn_of[overlapping(offsets, [span])] = number
    else:
        turn_of = None
    return Conversation((example.messages or ())[: row.num_turns], example.tools, tuple(row.numbers), turn_of)


def overlapping(offsets: Sequence[tuple[int, int]], spans: Iterable[tuple[int, int]]) -> np.ndarray:
    """Return a (T,) bool mask of the tokens that cover a character of a span.

    A token with empty offsets (trimmed white space, or an added space) covers the characters since
    the end of the token before it, or the next character.
    """
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    before = np.append(np.zeros(1, dtype=np.int64), np.maximum.accumulate(ends))[:-1]
    starts = np.where(starts == ends, np.minimum(before, starts), starts)
    ends = np.maximum(ends, starts + 1)
    found = np.zeros(len(starts), dtype=bool)
    for begin, end in spans:
        found |= (starts < end) & (ends > begin)
    return found


def _from_prompt(example: Example, vocabulary: Vocabulary, texts: bool) -> Document:
    """Tokenize a prompt and a completion; the completion's tokens and the EOS are predicted.

    Prompt and completion are tokenized separately, so that no token covers parts of both. This
    would add a space before the completion with tokenizers that add one before every text. With
    those, both are tokenized together, and a token belongs to the completion if its first
    character that is not white space does.

    Raises:
        BadRowError: no token belongs to the completion.
    """
    prompt, completion = example.prompt_completion or ("", "")
    if vocabulary.joins_words and vocabulary.tokenizer.is_fast:
        text = prompt + completion
        ids, num_bytes, offsets = vocabulary.encode(text)
        first = next((i for i, offset in enumerate(offsets) if _first_letter(text, offset) >= len(prompt)), len(ids))
        if first == len(ids):
            raise BadRowError(
                f"the tokenizer merges the completion into the prompt: {len(ids)} tokens of the joined text, all of them begin in the prompt"
            )
        before, after = (ids[:first], num_bytes[:first]), (ids[first:], num_bytes[first:])
        covered = Covered.of(text, offsets) if texts else None
    else:
        asked, answered = vocabulary.encode(prompt), vocabulary.encode(completion)
        before, after = asked[:2], answered[:2]
        covered = Covered.of(prompt, asked[2]).joined(Covered.of(completion, answered[2])) if texts else None
    bare = len(before[0])
    before = vocabulary.open(*before)
    after = vocabulary.close(*after)
    ids = np.concatenate([before[0], after[0]])
    predicted = np.arange(len(ids)) >= len(before[0])
    document = _document(example, ids, predicted, np.concatenate([before[1], after[1]]))
    return document if covered is None else _covering(document, covered, len(before[0]) - bare)


def _covering(document: Document, covered: Covered, before: int) -> Document:
    """Set `covered` on a document that has `before` special tokens before those of the text."""
    after = len(document.input_ids) - before - len(covered.starts)
    return dataclasses.replace(document, covered=covered.enclosed(before, after))


def _first_letter(text: str, offset: tuple[int, int]) -> int:
    start, end = offset
    return next((i for i in range(start, end) if not text[i].isspace()), start)


def _document(example: Example, ids: np.ndarray, predicted: np.ndarray, num_bytes: np.ndarray) -> Document:
    predicted = predicted.copy()
    predicted[:1] = False
    return Document(example, ids, predicted, num_bytes)
