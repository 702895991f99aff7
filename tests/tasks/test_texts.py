"""Contents that language-model rows store.

A row stores the text of its tokens, or its conversation and the supervised turns.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import BadRowError
from pipeline.records import Example, Message, Tokenization, TokenizedExample
from pipeline.tasks import get_task
from pipeline.tasks.documents import read_documents
from pipeline.tasks.texts import read_conversation
from tests.support.chats import FAMILIES as CHAT_FAMILIES
from tests.support.chats import TOOLS, call, result, tokenizer_of, turn
from tests.support.profile import examples
from tests.tasks.families import FAMILIES
from tests.tasks.test_chats import AGENT, CALLS, PLAIN, REASONED
from tests.tasks.test_families import a_text

LM = get_task("causal-lm")
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)


def rows_of(tokenizer: Any, length: int = 4000, *, texts: bool = True, **fields: Any) -> list[Any]:
    settled = {key: fields.pop(key) for key in ("assistant_turns", "truncation_side") if key in fields}
    return list(LM.tokenize([Example(7, **fields)], "train", tokenizer, Tokenization(length, **settled), texts=texts))


# -------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=examples(40, 400))
@given(st.lists(a_text, min_size=2, max_size=4).map(" the cat ".join), st.integers(3, 12))
def test_pieces_of_a_text_cover_all_of_it_in_order(family, text, length):
    tokenizer = FAMILIES[family]
    (document,) = read_documents([Example(0, text=text)], "train", tokenizer, Tokenization(4000), texts=True)
    covered = document.covered
    assert len(covered.starts) == len(covered.ends) == len(document.input_ids)
    real = covered.ends > covered.starts
    starts, ends = covered.starts[real], covered.ends[real]
    assert (starts[0], ends[-1]) == (0, len(text))
    assert (np.diff(starts) >= 0).all()
    assert (starts[1:] <= ends[:-1]).all(), "characters between two tokens are of neither"
    assert (covered.starts[~real] == covered.ends[~real]).all()
    (whole,) = rows_of(tokenizer, text=text)
    assert whole.text == text
    rows = [row for row in rows_of(tokenizer, length, text=text) if isinstance(row, TokenizedExample)]
    parts = [slice(i, i + length) for i in range(0, len(document.input_ids) - 1, length - 1)]
    for row, part in zip(rows, parts, strict=True):
        assert row.input_ids.tolist() == document.input_ids[part].tolist()
        inside = real[part]
        if inside.any():
            assert row.text == text[covered.starts[part][inside][0] : covered.ends[part][inside][-1]]
        else:
            assert row.text == ""
        assert row.text_bytes <= len(row.text.encode())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_supervised_stands_at_the_end(family):
    """The supervised text is the last `text_bytes` bytes, if every token has whole characters."""
    tokenizer = FAMILIES[family]
    text = "the cat sat on a mat 2+2= 4 it isn't 10 " * 6 + "mat"
    for row in rows_of(tokenizer, 9, text=text):
        context = tokenizer.decode(row.input_ids[:1], skip_special_tokens=True).strip().removeprefix("##")
        assert row.text.encode()[: len(row.text.encode()) - row.text_bytes].decode().strip() == context
    for side in (None, "left"):
        for length in (4000, 12):
            fields = {"prompt_completion": ("the cat sat ", "on a mat"), "truncation_side": side}
            for row in rows_of(tokenizer, length, **fields):
                if isinstance(row, TokenizedExample) and not (side == "left" and length == 12):
                    supervised = row.text.encode()[len(row.text.encode()) - row.text_bytes :].decode()
                    assert "on a mat".startswith(supervised.strip())
                    assert row.text.endswith(supervised)


def test_a_character_that_two_pieces_share_is_in_both():
    rows = rows_of(FAMILIES["gpt2"], 4, text="\U0001f415\U0001f415")
    assert [row.text for row in rows] == ["\U0001f415", "\U0001f415\U0001f415", "\U0001f415"]


def test_texts_are_kept_on_request_alone():
    for fields in ({"text": "the cat sat"}, {"prompt_completion": ("the", "cat")}, {"messages": PLAIN}):
        (row,) = rows_of(tokenizer_of("smollm2"), texts=False, **fields)
        assert (row.text, row.messages) == (None, None)
        (kept,) = rows_of(tokenizer_of("smollm2"), **fields)
        assert (kept.text is None) == ("messages" in fields)
        assert (kept.messages is None) == ("messages" not in fields)
        assert kept.input_ids.tolist() == row.input_ids.tolist()
        assert kept.supervised.tolist() == row.supervised.tolist()


# -------------------------------------------------------------------------------------------- chats


def rendered_again(tokenizer: Any, row: TokenizedExample) -> list[Any]:
    """Tokenize the stored conversation of a row again, as for another tokenizer."""
    messages, tools = read_conversation(row.messages or "")
    return rows_of(tokenizer, messages=messages, tools=tools)


CONVERSATIONS = {"plain": (PLAIN, None), "reasoned": (REASONED, None), "agent": (AGENT, TOOLS), "calls": (CALLS, TOOLS)}


TAKEN = [
    (family, name)
    for family, about in CHAT_FAMILIES.items()
    for name in CONVERSATIONS
    if about.tools or not CONVERSATIONS[name][1]
]


@pytest.mark.parametrize(("family", "name"), TAKEN)
@pytest.mark.parametrize("turns", [None, "each", "last"])
def test_the_conversation_of_a_row_renders_to_the_row(family, name, turns):
    tokenizer, (messages, tools) = tokenizer_of(family), CONVERSATIONS[name]
    rows = rows_of(tokenizer, messages=messages, tools=tools, assistant_turns=turns)
    numbers = []
    for row in rows:
        if not isinstance(row, TokenizedExample):
            continue
        (again,) = rendered_again(tokenizer, row)
        assert again.input_ids.tolist() == row.input_ids.tolist()
        assert again.supervised.tolist() == row.supervised.tolist()
        assert again.messages == row.messages
        numbers += json.loads(row.messages)["learnt"]
    assistants = [i for i, each in enumerate(messages) if each.role == "assistant"]
    if all(isinstance(row, TokenizedExample) for row in rows):
        assert numbers == (assistants[-1:] if turns == "last" else assistants)


def marked() -> Any:
    tokenizer = copy.copy(tokenizer_of("smollm2"))
    tokenizer.chat_template = MARKED
    return tokenizer


def test_a_template_that_marks_its_turns_has_the_whole_chat_in_the_row():
    tokenizer = marked()
    messages = (*PLAIN, turn("user", "bye"))
    (row,) = rows_of(tokenizer, messages=messages)
    content = json.loads(row.messages)
    assert (len(content["messages"]), content["learnt"], content["tools"]) == (6, [2, 4], None)
    silent = (*PLAIN[:2], Message("assistant", "Hello", learnt=False), *PLAIN[3:])
    (row,) = rows_of(tokenizer, messages=silent)
    assert json.loads(row.messages)["learnt"] == [4]
    (again,) = rendered_again(tokenizer, row)
    assert again.supervised.tolist() == row.supervised.tolist()
    first, second = rows_of(tokenizer, messages=messages, assistant_turns="each")
    assert [json.loads(each.messages)["learnt"] for each in (first, second)] == [[2], [4]]
    assert [len(json.loads(each.messages)["messages"]) for each in (first, second)] == [3, 5]


@pytest.mark.parametrize("tokenizer", [tokenizer_of("smollm2"), marked()], ids=["unmarked", "marked"])
@pytest.mark.parametrize(("side", "left"), [(None, [2]), ("left", [4])])
def test_a_turn_that_was_cut_off_is_not_learnt(tokenizer, side, left):
    (whole,) = rows_of(tokenizer, messages=PLAIN)
    ids = np.flatnonzero(whole.supervised)
    length = {None: int(np.flatnonzero(np.diff(ids) > 1)[0]) + int(ids[0]) + 3, "left": 8}[side]
    (row,) = rows_of(tokenizer, length, messages=PLAIN, truncation_side=side)
    content = json.loads(row.messages)
    assert content["learnt"] == left
    assert len(content["messages"]) == 5  # the context of the tokens


def test_all_that_a_template_reads_is_kept():
    arguments = {"q": ["x", 1.5, {"\u00e9": True}]}
    messages = (turn("user", "a"), call(arguments), result("42"), turn("assistant", "It is \U0001f415"))
    (row,) = rows_of(tokenizer_of("qwen-2.5"), messages=messages, tools=TOOLS)
    found, tools = read_conversation(row.messages)
    assert tools == TOOLS
    assert [each.role for each in found] == ["user", "assistant", "tool", "assistant"]
    assert found[1].content is None
    assert found[1].fields["tool_calls"][0]["function"] == {"name": "find", "arguments": arguments}
    assert found[2].fields == {"tool_call_id": "abcdefghi"}
    assert "\U0001f415" in row.messages
    assert [each.learnt for each in found] == [False, True, False, True]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"messages": [], "tools": null}',
        '{"messages": [{"role": 1}], "tools": null, "learnt": []}',
        '{"messages": [{"role": "user", "content": 3}], "tools": null, "learnt": []}',
        '{"messages": [{"role": "user"}], "tools": null, "learnt": [1]}',
        '{"messages": [{"role": "user"}], "tools": null, "learnt": [-1]}',
        '{"messages": [{"role": "user"}], "tools": [1], "learnt": [0]}',
        '{"messages": {"role": "user"}, "tools": null, "learnt": []}',
        "[" * 100_000,
    ],
)
def test_text_that_is_no_conversation_is_named(text):
    with pytest.raises(BadRowError, match="messages: expected the JSON text of"):
        read_conversation(text)
