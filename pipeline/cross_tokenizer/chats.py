"""Render stored conversations by the student's chat template and align the assistant's turns.

Outside the assistant's turns the rows of teacher and student hold different text. Templates also
insert text into the turns, such as a channel name or empty reasoning. Each turn is therefore
compared from its beginning, and from the beginning of each part of the message, for as long as both
rows have equal bytes. Special tokens are compared by their counterparts, so that the end of a turn
can match.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.cross_tokenizer.rows import CachedTokens, Columns, StudentRow, finished
from pipeline.cross_tokenizer.token_bytes import TokenBytes
from pipeline.cross_tokenizer.vocabulary_map import NONE
from pipeline.errors import BadRowError, MisuseError
from pipeline.records import Example, Message, Tokenization, TokenizedExample
from pipeline.tasks import writing_task
from pipeline.tasks.texts import read_conversation

#: No limit while rendering; `finished` truncates the row at its end, as it does other rows.
_ANY_LENGTH = 1 << 30
#: Number of occurrences of a text in a turn that are compared, counted from the last one.
_MOST_PLACES = 16


@dataclass(frozen=True, slots=True)
class ChatRenderer:
    """Renders conversations by a student's chat template and aligns them with teacher rows."""

    teacher: TokenBytes
    student: TokenBytes
    first_token: np.ndarray
    """As in `VocabularyMap`; used for special tokens."""
    settings: Tokenization
    max_length: int

    @classmethod
    def of(
        cls,
        teacher: TokenBytes,
        student: TokenBytes,
        first_token: np.ndarray,
        contract: Tokenization,
        max_length: int,
    ) -> ChatRenderer:
        """Create a renderer; keeps the teacher's template arguments that the student's reads.

        Raises:
            SourceError: the student's chat template cannot be read.
        """
        plain = Tokenization(_ANY_LENGTH, assistant_turns="auto")
        settings = _settled(plain, contract.chat_template_kwargs, student.tokenizer)
        return cls(teacher, student, first_token, settings, max_length)

    def row(self, row: CachedTokens) -> StudentRow | None:
        """The student's row.

        None: its template fails on the conversation, or yields no row with an assistant's turn.
        """
        assert row.messages is not None
        try:
            messages, tools = read_conversation(row.messages)
        except BadRowError:
            return None
        example = Example(row.source_row, messages=messages, tools=tools)
        made = list(writing_task().tokenize([example], "", self.student.tokenizer, self.settings, texts=True))
        rows = [each for each in made if isinstance(each, TokenizedExample)]
        if not rows:
            return None
        whole = rows[-1]  # the last of several rows has most of the conversation
        found = self._aligned(row, whole, messages)
        return dataclasses.replace(found, num_in_other_rows=sum(each.num_positions for each in rows[:-1]))

    def _aligned(self, row: CachedTokens, made: TokenizedExample, messages: Sequence[Message]) -> StudentRow:
        assert made.supervised is not None
        theirs = self._numbered(_turns(row.input_ids, row.supervised, self.teacher, self.first_token), messages)
        own = read_conversation(made.messages or "")[0]
        names = np.arange(len(self.student.pieces))
        ours = self._numbered(_turns(made.input_ids, made.supervised, self.student, names), own)
        size = len(made.input_ids)
        teacher, first, last = (np.full(size, NONE, dtype=np.int64) for _ in range(3))
        is_rebuilt = theirs is not None and ours is not None
        for number, turn in (ours or {}).items():
            other = (theirs or {}).get(number)
            if other is not None:
                _align(turn, other, _regions(turn.text, other.text, messages[number]), teacher, first, last)
            behind = int(turn.tokens[-1]) + 1
            if behind < size and first[behind] == NONE:  # ends the span before text of the template
                first[behind] = 0
        predicted = np.append(False, row.supervised[:-1])
        position = np.where(predicted, np.cumsum(predicted) - 1, NONE)
        num_bytes = self.student.vocabulary.bytes_of_ids(made.input_ids)
        columns = Columns(
            made.input_ids.astype(np.int32), num_bytes, np.append(False, made.supervised[:-1]), teacher, first, last
        )
        return finished(columns, position, self.max_length, None, is_rebuilt=is_rebuilt)

    def _numbered(self, turns: Sequence[_Turn], messages: Sequence[Message]) -> dict[int, _Turn] | None:
        """The turns by message number; None if there are not as many as supervised messages."""
        numbers = [i for i, message in enumerate(messages) if message.role == "assistant" and message.learnt]
        return dict(zip(numbers, turns, strict=True)) if len(numbers) == len(turns) else None


def _settled(plain: Tokenization, kwargs: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> Tokenization:
    task = writing_task()
    try:
        return task.settle(dataclasses.replace(plain, chat_template_kwargs=kwargs), tokenizer, chats=True)
    except MisuseError:  # the template does not read one of the arguments
        return task.settle(plain, tokenizer, chats=True)


@dataclass(frozen=True, slots=True)
class _Turn:
    """A run of consecutive supervised tokens."""

    tokens: np.ndarray
    """(t,) indices of the tokens in the row."""
    starts: np.ndarray
    """(t,) offset in `text` of the first byte of each token."""
    ends: np.ndarray
    """(t,) offset after the last byte."""
    text: bytes


def _turns(ids: np.ndarray, supervised: np.ndarray, vocabulary: TokenBytes, names: np.ndarray) -> list[_Turn]:
    """The runs of supervised tokens in a row.

    Args:
        names: (V,) the student's token that stands for each special token; -1: none.
    """
    predicted = np.append(False, supervised[:-1])
    bounds = np.flatnonzero(np.diff(np.concatenate([[False], predicted, [False]]).astype(np.int8)))
    turns = []
    for start, stop in bounds.reshape(-1, 2).tolist():
        pieces = [_written(int(token), vocabulary, names) for token in ids[start:stop].tolist()]
        ends = np.cumsum([len(piece) for piece in pieces])
        turns.append(_Turn(np.arange(start, stop), np.append(0, ends[:-1]), ends, b"".join(pieces)))
    return turns


def _written(token: int, vocabulary: TokenBytes, names: np.ndarray) -> bytes:
    """The bytes of a token; for tokens without known text, a name that is not valid UTF-8."""
    piece = vocabulary.pieces[token] if token < len(vocabulary.pieces) else None
    if piece is not None:
        return piece
    name = int(names[token]) if token < len(names) else NONE
    return b"\xff%d\xff" % name if name != NONE else b"\xff-%d\xff" % token


@dataclass(frozen=True, slots=True)
class _Region:
    """Equal bytes of two turns: `[ours, ours + size)` and `[theirs, theirs + size)`."""

    ours: int
    theirs: int
    size: int


def _regions(ours: bytes, theirs: bytes, said: Message) -> list[_Region]:
    """The common regions of two turns, in order; none begins inside another."""
    found: list[_Region] = []

    def is_new(place: int) -> bool:
        return not any(region.ours <= place < region.ours + region.size for region in found)

    def add(pairs: Iterable[tuple[int, int]]) -> None:
        """Add the pair with the longest common text; the reasoning may contain the answer too."""
        sizes = [(_common(ours[one:], theirs[other:]), one, other) for one, other in pairs if is_new(one)]
        size, one, other = max(sizes, default=(0, 0, 0))
        if size:
            found.append(_Region(one, other, size))

    add([(0, 0)])
    add([(len(ours) - len(ours.lstrip()), len(theirs) - len(theirs.lstrip()))])
    for text in sorted(_parts(said), key=len, reverse=True):  # a part inside another one comes after it
        add(product(islice(_places(ours, text), _MOST_PLACES), islice(_places(theirs, text), _MOST_PLACES)))
    return sorted(found, key=lambda region: region.ours)


def _places(turn: bytes, text: bytes) -> Iterator[int]:
    """Offsets of a text in a turn, from the last to the first."""
    at = turn.rfind(text)
    while at >= 0:
        yield at
        at = turn.rfind(text, 0, at + len(text) - 1)


def _parts(said: Message) -> list[bytes]:
    """The texts of a message in UTF-8, stripped of surrounding whitespace."""
    texts = [said.content, *(value for value in said.fields.values() if isinstance(value, str))]
    return [text.strip().encode() for text in texts if text and text.strip()]


def _align(
    ours: _Turn, theirs: _Turn, regions: Sequence[_Region], teacher: np.ndarray, first: np.ndarray, last: np.ndarray
) -> None:
    """Fill in `teacher`, `first` and `last` for the tokens of one turn; see `Columns`."""
    begins = dict(zip(theirs.starts.tolist(), range(len(theirs.starts)), strict=True))
    for region in regions:
        inside = (ours.starts >= region.ours) & (ours.ends <= region.ours + region.size) & (ours.ends > ours.starts)
        mapped = {
            i: begins.get(int(ours.starts[i]) - region.ours + region.theirs) for i in np.flatnonzero(inside).tolist()
        }
        heads = [(i, other) for i, other in mapped.items() if other is not None]
        for (i, other), after in zip(heads, [*heads[1:], None], strict=False):
            token = int(ours.tokens[i])
            if first[token] not in (NONE, 0):
                continue
            teacher[token] = first[token] = theirs.tokens[other]
            ends_alike = ours.ends[i] - region.ours == theirs.ends[other] - region.theirs <= region.size
            last[token] = (
                theirs.tokens[after[1] - 1] if after is not None else theirs.tokens[other] if ends_alike else NONE
            )
            if after is None and i + 1 < len(ours.tokens) and first[ours.tokens[i + 1]] == NONE:
                first[ours.tokens[i + 1]] = 0  # the last span ends with the common bytes


def _common(one: bytes, other: bytes) -> int:
    """The length in bytes of the common prefix."""
    size = min(len(one), len(other))
    differs = np.flatnonzero(np.frombuffer(one[:size], np.uint8) != np.frombuffer(other[:size], np.uint8))
    return int(differs[0]) if len(differs) else size
