"""Chats rendered by the student's own chat template, over pairs of template families."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.cross_tokenizer.chats import ChatRenderer
from pipeline.cross_tokenizer.rows import CachedTokens, StudentRow
from pipeline.cross_tokenizer.token_bytes import TokenBytes
from pipeline.cross_tokenizer.vocabulary_map import map_vocabulary
from pipeline.records import Example, Message, Tokenization, TokenizedExample
from pipeline.tasks import get_task
from tests.support.chats import FAMILIES, tokenizer_of, turn

BYTES = {name: TokenBytes.of(tokenizer_of(name)) for name in FAMILIES}
PAIRS = [(a, b) for a in FAMILIES for b in FAMILIES]
CHAT = (
    turn("user", "the cat?"),
    turn("assistant", "sat on the mat"),
    turn("user", "é 😀"),
    turn("assistant", "the cat\n\nsat."),
)


def teacher_rows(name: str, messages: tuple[Message, ...], **settings: Any) -> list[TokenizedExample]:
    task, tokenizer = get_task("causal-lm"), tokenizer_of(name)
    known = task.settle(Tokenization(512, **settings), tokenizer, chats=True)
    rows = task.tokenize([Example(0, messages=messages)], "train", tokenizer, known, texts=True)
    return [row for row in rows if isinstance(row, TokenizedExample)]


def renderer_of(teacher: str, student: str, max_length: int) -> ChatRenderer:
    theirs, ours = BYTES[teacher], BYTES[student]
    mapping = map_vocabulary(theirs, ours, len(theirs.pieces), len(ours.pieces))
    return ChatRenderer.of(theirs, ours, mapping.first_token, Tokenization(512), max_length)


def student_row(pair: tuple[str, str], row: TokenizedExample, max_length: int = 512) -> StudentRow:
    renderer = renderer_of(*pair, max_length)
    assert row.supervised is not None
    found = renderer.row(CachedTokens(row.input_ids, row.supervised, messages=row.messages))
    assert found is not None
    return found


def learnt(name: str, ids: np.ndarray, supervised: np.ndarray) -> list[tuple[int, str]]:
    """For each supervised position, the number of its turn and the rest of the turn's text.

    Turns are counted back from the last one, which is 0. The text begins at the predicted token.
    """
    tokenizer = tokenizer_of(name)
    places = np.flatnonzero(supervised) + 1
    turns = np.cumsum(np.diff(places, prepend=places[:1] - 2) > 1)
    turns = turns - turns.max()  # from the last one: the student's row may have fewer turns
    ends = {turn: places[turns == turn].max() for turn in set(turns.tolist())}
    special = BYTES[name].is_special
    return [
        (int(turn), tokenizer.decode([i for i in ids[place : ends[turn] + 1] if not special[i]]).rstrip())
        for place, turn in zip(places.tolist(), turns.tolist(), strict=True)
    ]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_turns_are_aligned_where_their_text_goes_on_alike(pair: tuple[str, str]) -> None:
    for row in teacher_rows(pair[0], CHAT):
        found = student_row(pair, row)
        assert row.supervised is not None
        assert found.is_rebuilt
        theirs = learnt(pair[0], row.input_ids, row.supervised)
        ours = learnt(pair[1], found.input_ids, found.supervised)
        pairs = [(ours[i], theirs[p]) for i, p in enumerate(found.teacher_position.tolist()) if p >= 0]
        assert all(one == other for one, other in pairs)
        texts = {(turn, text) for turn, text in ours if text} & {(turn, text) for turn, text in theirs if text}
        assert texts <= {one for one, _ in pairs}
        assert len(pairs) > len(texts) * 0.9


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_template_gives_the_identity(name: str) -> None:
    for row in teacher_rows(name, CHAT, assistant_turns="last"):
        found = student_row((name, name), row)
        assert row.supervised is not None
        assert found.input_ids.tolist() == row.input_ids.tolist()
        assert found.supervised.tolist() == row.supervised.tolist()
        aligned = found.teacher_position
        assert (aligned[aligned >= 0] == np.flatnonzero(aligned >= 0)).all()
        assert (aligned >= 0).mean() > 0.8


def test_only_the_turns_of_the_row_are_learnt() -> None:
    rows = teacher_rows("qwen-2.5", CHAT, assistant_turns="each")
    assert len(rows) == 2
    for row, text in zip(rows, ("sat on the mat", "the cat\n\nsat."), strict=True):
        found = student_row(("qwen-2.5", "mistral-v0.3"), row)
        tokens = found.input_ids[1:][found.supervised[:-1]]
        assert tokenizer_of("mistral-v0.3").decode(tokens, skip_special_tokens=True).strip() == text


def test_the_end_of_a_turn_is_aligned_and_a_span_by_itself() -> None:
    row = teacher_rows("smollm2", CHAT)[0]
    found = student_row(("smollm2", "llama-3.1"), row)
    tokens = found.input_ids[1:][found.supervised[:-1]]
    ends = np.flatnonzero(tokens == tokenizer_of("llama-3.1").eos_token_id)
    assert len(ends) == 2
    assert (found.teacher_position[ends] >= 0).all()
    for end in ends:
        span = found.span[end]
        assert span >= 0
        assert (found.span == span).sum() == 1
        assert found.span_stop[span] - found.span_start[span] == 1


def test_a_conversation_that_the_template_refuses_is_left_to_the_text() -> None:
    messages = (turn("system", "a"), turn("user", "b"), turn("user", "c"), turn("assistant", "d"))
    row = teacher_rows("qwen-2.5", messages)[0]
    renderer = renderer_of("qwen-2.5", "mistral-v0.3", 512)
    assert row.supervised is not None
    assert renderer.row(CachedTokens(row.input_ids, row.supervised, messages=row.messages)) is None
    assert renderer.row(CachedTokens(row.input_ids, row.supervised, messages="no JSON")) is None


def test_an_answer_that_the_thought_says_too_is_met_in_the_answer() -> None:
    """Both templates render thought and answer, with different text between them."""
    messages = (turn("user", "the cat?"), turn("assistant", "sat.", reasoning_content="on the mat sat. the cat"))
    row = teacher_rows("qwen-3", messages)[0]
    found = student_row(("qwen-3", "gpt-oss"), row)
    assert found.is_rebuilt
    ids = found.input_ids[1:][found.supervised[:-1]].tolist()
    text = [tokenizer_of("gpt-oss").decode(ids[i:], skip_special_tokens=True) for i in range(len(ids))]
    met = [text[i] for i in np.flatnonzero(found.teacher_position >= 0)]
    assert any(each.startswith("on the mat sat. the cat") for each in met)
    assert "sat." in met, "the answer"
