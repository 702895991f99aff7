"""Retokenize rows of a cache for a student and align them with the teacher's positions.

Both tokenizations cover the same bytes. A position of the student is aligned with the position of
the teacher whose next token begins at the same byte of the same text. A *span* is the text between
two bytes where tokens of both begin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.cross_tokenizer.token_bytes import Run, TokenBytes
from pipeline.cross_tokenizer.vocabulary_map import NONE


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """The columns of a cached row that alignment reads."""

    input_ids: np.ndarray
    """(T,) integers."""
    supervised: np.ndarray
    """(T,) bool."""
    continues: bool = False
    """Whether the row begins inside a text, as a later piece of it."""
    text_bytes: int | None = None
    """Bytes that the supervised positions predict; None: not known."""
    text: str | None = None
    """The text of the row, if it was stored."""
    source_row: int = 0
    messages: str | None = None
    """The conversation of the row, if it was stored: the column `messages`."""
    document_lengths: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class StudentRow:
    """A row in the student's tokens, with M supervised positions and S spans."""

    input_ids: np.ndarray
    """(T,) int32."""
    supervised: np.ndarray
    """(T,) bool."""
    teacher_position: np.ndarray
    """(M,) int32: the teacher's supervised position whose next token begins at the same byte; -1:
    none."""
    span: np.ndarray
    """(M,) int32: the span of the predicted token; -1: no span that both models predict."""
    span_start: np.ndarray
    """(S,) int32: the first of the teacher's supervised positions that predict the span."""
    span_stop: np.ndarray
    """(S,) int32: one past the last of these positions."""
    text_bytes: int
    """Bytes that the supervised positions predict."""
    document_lengths: np.ndarray | None
    is_rebuilt: bool
    """False: the text cannot be rebuilt from the token ids, so no position is aligned."""
    num_cut: int
    """Supervised positions beyond the maximum length, which are left out."""
    num_in_other_rows: int = 0
    """Supervised positions of turns that the chat template renders into other rows."""
    num_dropped: int = 0
    """Special tokens of the teacher's row without a counterpart in the student's vocabulary."""


@dataclass(frozen=True, slots=True)
class _Special:
    """A special token of the student."""

    token: int
    teacher: int
    """Index in the row of the teacher's token that it replaces; -1: none."""


@dataclass(frozen=True, slots=True)
class _Text:
    """A text of the row, between special tokens."""

    run: Run
    first: int
    """Index in the row of the teacher's first token of the text."""
    kind: str
    """`start`: at the start of a text; `inside`: later in it; `after`: after a special token."""


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A text in the student's tokens."""

    text: _Text
    ids: np.ndarray
    starts: np.ndarray
    """(t,) offset of each token in the bytes of the run."""
    ends: np.ndarray
    is_valid: bool
    """False: the bytes of the run are not valid UTF-8."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The T tokens of a student's row and how they match the teacher's tokens."""

    ids: np.ndarray
    num_bytes: np.ndarray
    predicted: np.ndarray
    """(T,) bool: whether the token is a target of a supervised position."""
    teacher: np.ndarray
    """(T,) the teacher's token that begins at the same byte; -1: none."""
    span_first: np.ndarray
    """(T,) the teacher's first token of the span that begins here; -1: no span begins here."""
    span_last: np.ndarray
    """(T,) the teacher's last token of that span; -1: it has no end common to both rows."""


@dataclass(frozen=True, slots=True)
class Retokenizer:
    """Converts rows of a teacher's tokens to rows of a student's tokens."""

    teacher: TokenBytes
    student: TokenBytes
    first_token: np.ndarray
    """As in `VocabularyMap`; used for special tokens."""
    max_length: int
    """The student's maximum length in tokens."""

    def rows(self, rows: Sequence[CachedTokens]) -> list[StudentRow]:
        """Convert rows, in order; all texts are tokenized in one batch."""
        plans = [[self._parts(row, start, stop) for start, stop in _documents(row)] for row in rows]
        every = [part for plan in plans for document in plan for part in document if isinstance(part, _Text)]
        encoded = self._encode(every)
        return [self._row(row, plan, encoded) for row, plan in zip(rows, plans, strict=True)]

    def _parts(self, row: CachedTokens, start: int, stop: int) -> list[_Special | _Text]:
        """Split one document of a row into texts and the special tokens between them."""
        ids = row.input_ids[start:stop].astype(np.int64)
        inside = row.continues and start == 0
        runs = list(self.teacher.runs(ids, continues=inside))
        if row.text_bytes == self._num_predicted(row, runs) + 1 and runs[0].adds_space:
            runs = list(self.teacher.runs(ids, continues=True))  # the text itself has the space; none was added
        if row.text is not None and len(runs) == 1:
            runs = [self._with_text(runs[0], ids, row.text)]
        parts: list[_Special | _Text] = []
        theirs, ours = self.teacher.vocabulary.prefix, self.student.vocabulary.prefix
        at = 0
        if not inside and tuple(ids[: len(theirs)].tolist()) == theirs:
            parts.extend(_Special(token, NONE) for token in ours)
            at = len(theirs)
        for number, run in enumerate(runs):
            between = self._specials(ids, at, run.first, start)
            parts.extend(between)
            kind = "after" if number or between else "inside" if inside else "start"
            parts.append(_Text(run, start + run.first, kind))
            at = run.first + len(run.starts)
        return parts + self._specials(ids, at, len(ids), start)

    def _num_predicted(self, row: CachedTokens, runs: Sequence[Run]) -> int:
        """Bytes that the supervised positions predict; -2 for several documents or no text."""
        if row.document_lengths is not None or not runs:
            return -2
        predicted = np.append(False, row.supervised[:-1])
        return sum(
            int((run.ends - run.starts)[predicted[run.first : run.first + len(run.starts)]].sum()) for run in runs
        )

    def _specials(self, ids: np.ndarray, at: int, stop: int, start: int) -> list[_Special | _Text]:
        known = [
            (i, int(self.first_token[ids[i]]) if ids[i] < len(self.first_token) else NONE) for i in range(at, stop)
        ]
        return [_Special(token, start + i) for i, token in known if token != NONE]

    def _with_text(self, run: Run, ids: np.ndarray, text: str) -> Run:
        """The run with the stored text, if that has the tokens of the run."""
        found, num_bytes, offsets = self.teacher.vocabulary.encode(text)
        if not offsets or not np.array_equal(found, ids[run.first : run.first + len(run.starts)]):
            return run
        ends = np.cumsum(num_bytes)
        return Run(run.first, text.encode(), ends - num_bytes, ends, run.adds_space, True)

    # --------------------------------------------------------------------------- the student's side

    def _encode(self, texts: Sequence[_Text]) -> Iterator[_Encoded]:
        decoded = [_decode(text.run.text) for text in texts]
        anchored = [self._needs_anchor(text) for text in texts]
        covering = dataclasses.replace(self.student.vocabulary, special=frozenset())  # what a text spells is text
        plain: Any = iter(())
        strings = [
            string.removeprefix(" ") if text.kind == "inside" and self.student.vocabulary.adds_space else string
            for text, (string, _, _) in zip(texts, decoded, strict=True)
        ]
        chosen = [string for string, with_anchor in zip(strings, anchored, strict=True) if not with_anchor]
        if chosen:
            found = self.student.tokenizer(
                chosen, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
            )
            plain = zip(found["input_ids"], found["offset_mapping"], strict=True)
        for text, string, (whole, skipped, is_valid), with_anchor in zip(
            texts, strings, decoded, anchored, strict=True
        ):
            ids, offsets = self._after_special(string) if with_anchor else next(plain)
            ids = np.asarray(ids, dtype=np.int32)
            ends = np.cumsum(covering.bytes_of_text(string, ids, offsets)) if len(ids) else ids
            ends = ends + len(whole.encode()) - len(string.encode()) + skipped
            starts = np.append(0, ends[:-1]) if len(ids) else ends
            yield _Encoded(text, ids, starts, ends, is_valid)

    def _needs_anchor(self, text: _Text) -> bool:
        """Whether the tokenizer adds a space at the start, but not after a special token."""
        found = self.student.vocabulary
        return text.kind == "after" and found.adds_space and not found.adds_space_after_special

    def _after_special(self, string: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens and offsets of a text that follows a special token."""
        tokenizer = self.student.tokenizer
        anchor = tokenizer.eos_token or next(iter(tokenizer.all_special_tokens), "")
        found = tokenizer(anchor + string, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        shift = len(anchor)
        pairs = [p for p in zip(found["input_ids"], found["offset_mapping"], strict=True) if p[1][1] > shift]
        if self.student.is_special[[token for token, _ in pairs]].any():  # a special token spelled in a text is text
            found = tokenizer(string, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
            return found["input_ids"], found["offset_mapping"]
        return [token for token, _ in pairs], [(max(a - shift, 0), b - shift) for _, (a, b) in pairs]

    def _row(
        self, row: CachedTokens, plan: Sequence[Sequence[_Special | _Text]], encoded: Iterator[_Encoded]
    ) -> StudentRow:
        predicted = np.append(False, row.supervised[:-1])
        position = np.where(predicted, np.cumsum(predicted) - 1, NONE)  # the teacher's, by predicted token
        columns: list[Columns] = []
        lengths: list[int] = []
        is_rebuilt, num_bytes = True, 0
        for document in plan:
            lengths.append(0)
            for part in document:
                if isinstance(part, _Special):
                    columns.append(_special(part, predicted))
                else:
                    found = next(encoded)
                    run = found.text.run
                    is_rebuilt &= found.is_valid and run.is_exact
                    num_bytes += int(
                        (run.ends - run.starts)[predicted[part.first : part.first + len(run.starts)]].sum()
                    )
                    columns.append(self._text(found, predicted))
                lengths[-1] += len(columns[-1].ids)
        is_rebuilt &= row.text_bytes is None or row.text_bytes == num_bytes
        if not sum(lengths):  # a row is never empty
            columns.append(_special(_Special(self._filler(), NONE), predicted))
            lengths[-1] = 1
        joined = Columns(*(np.concatenate([getattr(c, name) for c in columns]) for name in Columns.__slots__))
        kept = None if row.document_lengths is None else lengths
        made = finished(joined, position, self.max_length, kept, is_rebuilt=is_rebuilt)
        return dataclasses.replace(made, num_dropped=self._num_dropped(row.input_ids))

    def _num_dropped(self, ids: np.ndarray) -> int:
        known = ids[ids < min(len(self.first_token), len(self.teacher.is_special))]
        dropped = self.teacher.is_special[known] & (self.first_token[known] == NONE)
        return int((dropped & ~np.isin(known, self.teacher.vocabulary.prefix)).sum())

    def _filler(self) -> int:
        tokenizer = self.student.tokenizer
        return next((i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id) if isinstance(i, int)), 0)

    def _text(self, found: _Encoded, predicted: np.ndarray) -> Columns:
        run, first = found.text.run, found.text.first
        theirs = predicted[first : first + len(run.starts)]
        some = np.flatnonzero(run.ends > run.starts)  # tokens without bytes have no start
        starts = run.starts[some]
        unlearnt = np.append(0, np.cumsum(np.where(theirs, 0, run.ends - run.starts)[some]))
        bounds = np.append(starts, len(run.text))
        before = np.interp(found.starts, bounds, unlearnt)
        behind = np.interp(np.maximum(found.ends, np.minimum(found.starts + 1, len(run.text))), bounds, unlearnt)
        place = np.searchsorted(starts, found.starts)
        place = np.minimum(place, max(len(starts) - 1, 0))
        meets = (starts[place] == found.starts) if len(starts) else np.zeros(len(found.ids), dtype=bool)
        meets = meets & (found.ends > found.starts)
        alike = len(found.ids) > 0 and run.adds_space == self.student.begins_with_added_space(
            int(found.ids[0]), int(found.ends[0])
        )
        teacher = np.where(meets & (alike | (found.starts > 0)), first + (some[place] if len(some) else 0), NONE)
        if alike and found.ends[0] == 0 == run.ends[0]:  # both begin with a lone word-start marker
            teacher[0] = first
        return Columns(
            found.ids, found.ends - found.starts, before == behind, teacher, *_spans(found, meets, some, place)
        )


def _special(part: _Special, predicted: np.ndarray) -> Columns:
    one = np.array([part.teacher])
    flag = np.array([part.teacher != NONE and bool(predicted[part.teacher])])
    head = np.maximum(one, 0)  # a BOS of the student is in no span and ends the span of the document before
    return Columns(np.array([part.token], dtype=np.int32), np.zeros(1, dtype=np.int64), flag, one, head, one)


def _spans(found: _Encoded, meets: np.ndarray, some: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last teacher token of the span at each token of a text; see `Columns`."""
    run, first = found.text.run, found.text.first
    span_first, span_last = (np.full(len(found.ids), NONE) for _ in range(2))
    heads = np.flatnonzero(meets)
    if len(found.ids) and not meets[0]:
        if len(heads) and not found.ends[: heads[0]].any():  # a lone word-start marker belongs to the first letter
            heads[0] = 0
        else:  # text before the first common start is in no span and ends the one of the part before
            span_first[0] = first
    if not len(heads):
        return span_first, span_last
    begins = np.searchsorted(run.starts, np.where(heads == 0, 0, found.starts[heads]))  # includes tokens without bytes
    ends = np.append(begins[1:], len(run.starts))
    is_whole = np.ones(len(heads), dtype=bool)
    is_whole[-1] = int(found.ends[-1]) == len(run.text)
    span_first[heads] = first + begins
    span_last[heads] = np.where(is_whole, first + ends - 1, NONE)
    return span_first, span_last


def finished(
    columns: Columns, position: np.ndarray, longest: int, lengths: list[int] | None, *, is_rebuilt: bool
) -> StudentRow:
    """Build the student's row: truncate it and keep the spans that both models predict completely.

    `position` is the teacher's supervised position that predicts each of its tokens, or -1.
    `lengths` are tokens per document; None: documents are not isolated.
    """
    predicted = columns.predicted.copy()
    predicted[0] = False
    kept = np.arange(len(predicted)) < longest
    targets = predicted & kept
    span = np.cumsum(columns.span_first != NONE) - 1  # span of each token; -1 before the first one
    heads = np.flatnonzero(columns.span_first != NONE)
    first, last = columns.span_first[heads], columns.span_last[heads]
    sizes = np.bincount(span[span >= 0], minlength=len(heads))
    learnt = np.bincount(span[(span >= 0) & targets], minlength=len(heads))
    theirs = np.append(0, np.cumsum(position != NONE))
    learnt_by_teacher = theirs[last + 1] - theirs[first]
    is_good = (last != NONE) & (sizes == learnt) & (learnt_by_teacher == last + 1 - first) & is_rebuilt
    number = np.where(is_good, np.cumsum(is_good) - 1, NONE)
    aligned = (
        np.where(columns.teacher != NONE, position[columns.teacher], NONE)
        if is_rebuilt
        else np.full(len(predicted), NONE)
    )
    return StudentRow(
        input_ids=columns.ids[kept].astype(np.int32),
        supervised=np.append(predicted[kept][1:], False),
        teacher_position=aligned[targets].astype(np.int32),
        span=np.where(span >= 0, np.append(number, NONE)[span], NONE)[targets].astype(np.int32),
        span_start=position[first[is_good]].astype(np.int32),
        span_stop=(position[first[is_good]] + (last - first + 1)[is_good]).astype(np.int32),
        text_bytes=int(columns.num_bytes[targets].sum()),
        document_lengths=None if lengths is None else _cut_lengths(lengths, longest),
        is_rebuilt=is_rebuilt,
        num_cut=int((predicted & ~kept).sum()),
    )


def without_alignment(row: StudentRow) -> StudentRow:
    """A copy of the row without aligned positions and spans; it has hard labels only."""
    none = np.zeros(0, dtype=np.int32)
    return dataclasses.replace(
        row,
        teacher_position=np.full_like(row.teacher_position, NONE),
        span=np.full_like(row.span, NONE),
        span_start=none,
        span_stop=none,
        is_rebuilt=False,
    )


def _cut_lengths(lengths: list[int], longest: int) -> np.ndarray:
    ends = np.minimum(np.cumsum(lengths), longest)
    found: np.ndarray = np.diff(ends, prepend=0).astype(np.int32)
    return found[found > 0]


def _documents(row: CachedTokens) -> list[tuple[int, int]]:
    """Start and end of each document of a row; one document if they are not isolated."""
    if row.document_lengths is None:
        return [(0, len(row.input_ids))]
    ends = np.cumsum(row.document_lengths).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _decode(data: bytes) -> tuple[str, int, bool]:
    """Decode bytes that may begin and end inside a character.

    Returns the text, the bytes skipped of a character cut at the start, and whether the rest is
    UTF-8, except for a character cut at the end.
    """
    skipped = next((n for n in range(min(4, len(data))) if data[n] & 0xC0 != 0x80), 0)
    try:
        return data[skipped:].decode(), skipped, True
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            return data[skipped : skipped + error.start].decode(), skipped, True
        return data[skipped:].decode(errors="replace"), skipped, False
