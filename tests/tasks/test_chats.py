"""Supervised tokens of chats, with the templates of model families.

Covers which turns are supervised, their context, and how turns are split into rows.
"""

# ruff: noqa: RUF001 - control tokens of DeepSeek
from __future__ import annotations

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import MisuseError, SourceError
from pipeline.records import BadRow, Columns, Cut, Example, Message, Tokenization, TokenizedExample
from pipeline.tasks import get_task
from pipeline.tasks.chats import supervision
from tests.support.chats import FAMILIES, TOOLS, call, result, tokenizer_of, turn

LM = get_task("causal-lm")
PLAIN = (
    turn("system", "S"),
    turn("user", "hi"),
    turn("assistant", "Hello"),
    turn("user", "hi"),
    turn("assistant", "Yes"),
)
REASONED = (
    turn("user", "a"),
    turn("assistant", "<think>\nfirst\n</think>\n\nHello"),
    turn("user", "b"),
    turn("assistant", "<think>\nthen\n</think>\n\nYes"),
)
AGENT = (
    turn("user", "a"),
    call({"q": "x"}, reasoning_content="R1"),
    result("41"),
    call({"q": "y"}, reasoning_content="R2"),
    result("42"),
    turn("assistant", "It is 42", reasoning_content="R3"),
)
CALLS = (
    turn("user", "a"),
    call('{"q": "x"}'),
    result("42"),
    turn("assistant", "It is 42"),
    turn("user", "b"),
    call('{"q": "y"}'),
    result("43"),
    turn("assistant", "It is 43"),
)


def rows_of(
    family: str | Any, messages: tuple[Message, ...], tools: Any = None, length: int = 4000, **given: Any
) -> list[TokenizedExample | BadRow]:
    tokenizer = tokenizer_of(family) if isinstance(family, str) else family
    example = Example(7, messages=messages, tools=tools)
    return list(LM.tokenize([example], "train", tokenizer, Tokenization(length, **given)))


def parts(family: str | Any, row: TokenizedExample | BadRow) -> list[tuple[str, bool]]:
    """Return a row as runs of text, each with whether it is supervised."""
    assert isinstance(row, TokenizedExample), row
    assert row.supervised is not None
    tokenizer = tokenizer_of(family) if isinstance(family, str) else family
    learnt = np.append(False, row.supervised[:-1])
    cuts = [0, *(np.flatnonzero(np.diff(learnt)) + 1).tolist(), len(learnt)]
    return [(tokenizer.decode(row.input_ids[a:b]), bool(learnt[a])) for a, b in itertools.pairwise(cuts)]


def learnt(family: str | Any, rows: list[TokenizedExample | BadRow]) -> list[list[str]]:
    return [[text for text, mark in parts(family, row) if mark] for row in rows]


def with_template(source: str, family: str = "smollm2") -> Any:
    tokenizer = copy.copy(tokenizer_of(family))
    tokenizer.chat_template = source
    return tokenizer


EMPTY = "<think>\n\n</think>\n\n"
HARMONY = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"
R1_CALL = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>find\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
QWEN_CALL = '<tool_call>\n{{"name": "find", "arguments": {{"q": "{}"}}}}\n</tool_call><|im_end|>'
EXPECTED: list[tuple[str, tuple[Message, ...], Any, list[list[str]]]] = [
    # Templates that render a longer chat as a continuation of a shorter one: a chat is one row.
    ("llama-3.1", PLAIN, None, [["Hello<|eot_id|>", "Yes<|eot_id|>"]]),
    ("qwen-2.5", PLAIN, None, [["Hello<|im_end|>", "Yes<|im_end|>"]]),
    ("gemma-3", PLAIN, None, [["Hello<end_of_turn>", "Yes<end_of_turn>"]]),
    ("mistral-v7", PLAIN, None, [["Hello</s>", "Yes</s>"]]),
    ("deepseek-r1", PLAIN, None, [["Hello<｜end▁of▁sentence｜>", "Yes<｜end▁of▁sentence｜>"]]),
    ("phi-4", PLAIN, None, [["Hello<|im_end|>", "Yes<|im_end|>"]]),
    ("phi-4-mini", PLAIN, None, [["Hello<|end|>", "Yes<|end|>"]]),
    ("smollm2", PLAIN, None, [["Hello<|im_end|>", "Yes<|im_end|>"]]),
    # Templates that put the system text in the last question, an empty reasoning in the last turn,
    # or <|return|> only at the end.
    ("mistral-v0.3", PLAIN, None, [[" Hello</s>"], [" Yes</s>"]]),
    ("mistral-v0.3", PLAIN[1:], None, [[" Hello</s>", " Yes</s>"]]),
    ("qwen-3", PLAIN, None, [[f"{EMPTY}Hello<|im_end|>"], [f"{EMPTY}Yes<|im_end|>"]]),
    ("gpt-oss", PLAIN, None, [[f"{HARMONY}Hello<|return|>"], [f"{HARMONY}Yes<|return|>"]]),
    # Reasoning in the content: Qwen 3 drops it from earlier turns, DeepSeek-R1 from every turn.
    ("smollm2", REASONED, None, [[f"{turn.content}<|im_end|>" for turn in REASONED[1::2]]]),
    ("qwen-3", REASONED, None, [[f"{turn.content}<|im_end|>"] for turn in REASONED[1::2]]),
    (
        "deepseek-r1",
        REASONED,
        None,
        [["first\n</think>\n\nHello<｜end▁of▁sentence｜>"], ["then\n</think>\n\nYes<｜end▁of▁sentence｜>"]],
    ),
    # Reasoning and tools with one question: each turn has the previous ones in its context.
    (
        "qwen-3",
        AGENT,
        TOOLS,
        [
            [
                f"<think>\nR1\n</think>\n\n{QWEN_CALL.format('x')}",
                f"<think>\nR2\n</think>\n\n{QWEN_CALL.format('y')}",
                "<think>\nR3\n</think>\n\nIt is 42<|im_end|>",
            ]
        ],
    ),
    (
        "gpt-oss",
        AGENT,
        TOOLS,
        [
            [
                ANALYSIS.format("R1") + ' to=functions.find<|channel|>commentary json<|message|>{"q": "x"}<|call|>',
                ANALYSIS.format("R2") + ' to=functions.find<|channel|>commentary json<|message|>{"q": "y"}<|call|>',
                ANALYSIS.format("R3") + f"{HARMONY}It is 42<|return|>",
            ]
        ],
    ),
    # Tools with arguments as JSON text, whether the template expects text or objects.
    (
        "llama-3.1",
        CALLS,
        TOOLS,
        [
            [
                '{"name": "find", "parameters": {"q": "x"}}<|eot_id|>',
                "It is 42<|eot_id|>",
                '{"name": "find", "parameters": {"q": "y"}}<|eot_id|>',
                "It is 43<|eot_id|>",
            ]
        ],
    ),
    (
        "qwen-2.5",
        CALLS,
        TOOLS,
        [[QWEN_CALL.format("x"), "It is 42<|im_end|>", QWEN_CALL.format("y"), "It is 43<|im_end|>"]],
    ),
    (
        "mistral-v0.3",
        CALLS,
        TOOLS,
        [
            ['[TOOL_CALLS] [{"name": "find", "arguments": {"q": "x"}, "id": "abcdefghi"}]</s>', " It is 42</s>"],
            ['[TOOL_CALLS] [{"name": "find", "arguments": {"q": "y"}, "id": "abcdefghi"}]</s>', " It is 43</s>"],
        ],
    ),
    (
        "mistral-v7",
        CALLS,
        TOOLS,
        [
            ['[TOOL_CALLS][{"name": "find", "arguments": {"q": "x"}}]</s>', "It is 42</s>"],
            ['[TOOL_CALLS][{"name": "find", "arguments": {"q": "y"}}]</s>', "It is 43</s>"],
        ],
    ),
    (
        "phi-4-mini",
        CALLS,
        TOOLS,
        [
            [
                '<|tool_call|>{"name": "find", "arguments": {"q": "x"}}<|/tool_call|><|end|>',
                "It is 42<|end|>",
                '<|tool_call|>{"name": "find", "arguments": {"q": "y"}}<|/tool_call|><|end|>',
                "It is 43<|end|>",
            ]
        ],
    ),
    (
        "deepseek-r1",
        CALLS[:4],
        None,
        [["<｜tool▁calls▁begin｜>" + R1_CALL.format('{"q": "x"}'), "It is 42<｜end▁of▁sentence｜>"]],
    ),
]


@pytest.mark.parametrize(("family", "messages", "tools", "expected"), EXPECTED)
def test_the_assistants_turns_are_learnt_with_the_tokens_that_end_them(
    family: str, messages: tuple[Message, ...], tools: Any, expected: list[list[str]]
) -> None:
    rows = rows_of(family, messages, tools)
    assert learnt(family, rows) == expected
    assert [(row.source_row, row.piece) for row in rows if isinstance(row, TokenizedExample)] == [
        (7, piece) for piece in range(len(expected))
    ]
    assert next(row.split_chats for row in rows if isinstance(row, TokenizedExample)) == (
        (len(expected),) if len(expected) > 1 else ()
    )
    for row in rows:
        text, mark = parts(family, row)[-1]
        assert mark, text  # text after the last turn is not kept


def test_every_family_is_among_them() -> None:
    assert {case[0] for case in EXPECTED} == set(FAMILIES)


# Independent renderings of each family's turns: text, reasoning and call -> supervised text.
SAID: dict[str, Any] = {
    "llama-3.1": lambda text, _, found: (
        f'{{"name": "find", "parameters": {found}}}<|eot_id|>' if found else f"{text.strip()}<|eot_id|>"
    ),
    "qwen-2.5": lambda text, _, found: (
        f'<tool_call>\n{{"name": "find", "arguments": {found}}}\n</tool_call><|im_end|>'
        if found
        else f"{text}<|im_end|>"
    ),
    "qwen-3": lambda text, thought, found: (
        f"<think>\n{thought}\n</think>\n\n"
        + (
            f'<tool_call>\n{{"name": "find", "arguments": {found}}}\n</tool_call><|im_end|>'
            if found
            else text.lstrip("\n") + "<|im_end|>"
        )
    ),
    "gemma-3": lambda text, *_: f"{text.strip()}<end_of_turn>",
    "mistral-v7": lambda text, _, found: (
        f'[TOOL_CALLS][{{"name": "find", "arguments": {found}}}]</s>' if found else f"{text}</s>"
    ),
    "mistral-v0.3": lambda text, _, found: (
        f'[TOOL_CALLS] [{{"name": "find", "arguments": {found}, "id": "abcdefghi"}}]</s>'
        if found
        else f" {text.strip()}</s>"
    ),
    "gpt-oss": lambda text, thought, found: (
        (ANALYSIS.format(thought) if thought else "")
        + (
            f" to=functions.find<|channel|>commentary json<|message|>{found}<|call|>"
            if found
            else f"{HARMONY}{text}<|return|>"
        )
    ),
    "phi-4": lambda text, *_: f"{text}<|im_end|>",
    "phi-4-mini": lambda text, _, found: (
        f'<|tool_call|>{{"name": "find", "arguments": {found}}}<|/tool_call|><|end|>' if found else f"{text}<|end|>"
    ),
    "smollm2": lambda text, *_: f"{text}<|im_end|>",
}
WORDS = st.lists(st.sampled_from(["the cat", "日本", " ", "\n", "2+2", "🐕", "e\u0301", "{}"]), min_size=1, max_size=4)
TEXT = WORDS.map("".join).filter(str.strip)
EXCHANGE = st.tuples(TEXT, st.lists(TEXT, max_size=2), TEXT, TEXT | st.just(""))


@pytest.mark.parametrize("family", SAID)
@settings(deadline=None, max_examples=40)
@given(st.lists(EXCHANGE, min_size=1, max_size=3), TEXT | st.none(), st.booleans())
def test_random_chats_are_learnt_turn_by_turn_in_the_context_of_inference(
    family: str, exchanges: list[Any], system: str | None, as_text: bool
) -> None:
    kind = FAMILIES[family]
    messages = [turn("system", system)] if system is not None else []
    said: dict[int, str] = {}
    for question, queries, answer, thought in exchanges:
        thought = thought.strip() if kind.reasoning else ""
        fields = {"reasoning_content": thought} if thought else {}
        messages.append(turn("user", question))
        for query in queries if kind.tools else []:
            arguments = json.dumps({"q": query}, ensure_ascii=False)
            said[len(messages)] = SAID[family]("", thought, arguments)
            messages += [call(arguments if as_text else {"q": query}, **fields), result(query)]
        said[len(messages)] = SAID[family](answer, thought, "")
        messages.append(turn("assistant", answer, **fields))
    tools = TOOLS if kind.tools else None
    rows = rows_of(family, tuple(messages), tools)
    pieces = [parts(family, row) for row in rows]
    found = [
        (_undated("".join(text for text, _ in row[:i])), text)
        for row in pieces
        for i, (text, mark) in enumerate(row)
        if mark
    ]
    expected = []
    for number, text in said.items():
        chat: Any = [{"role": m.role, "content": m.content, **_as_objects(m.fields)} for m in messages[:number]]
        if family == "mistral-v7":
            chat = [{**each, **_as_texts(each)} for each in chat]
        asked = tokenizer_of(family).apply_chat_template(
            chat, tools=list(tools) if tools else None, add_generation_prompt=True, tokenize=False
        )
        expected.append((_undated(asked), text))
    assert sorted(found) == sorted(expected)  # with equal questions, the first and the last turn may share a row


def _as_objects(fields: Any) -> Any:
    return _with_arguments(fields, lambda each: json.loads(each) if isinstance(each, str) else each)


def _as_texts(fields: Any) -> Any:
    return _with_arguments(fields, lambda each: each if isinstance(each, str) else json.dumps(each, ensure_ascii=False))


def _with_arguments(fields: Any, convert: Any) -> Any:
    fields = copy.deepcopy(dict(fields))
    for each in fields.get("tool_calls", ()):
        each["function"]["arguments"] = convert(each["function"]["arguments"])
    return fields


def _undated(text: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\d|\d\d [A-Z][a-z]{2} \d{4}", "DAY", text)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("each", [["Hello<|im_end|>"], ["Yes<|im_end|>"]]),
        ("last", [["Yes<|im_end|>"]]),
        ("all", [["Hello<|im_end|>", "Yes<|im_end|>"]]),
        (None, [["Hello<|im_end|>", "Yes<|im_end|>"]]),
    ],
)
@pytest.mark.parametrize("marked", [False, True])
def test_which_turns_are_learnt(mode: Any, expected: list[list[str]], marked: bool) -> None:
    """Turns are selected with and without marks; both make the same rows.

    A row of one turn has the turns before it as its context.
    """
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    unmarked = source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer = with_template(source if marked else unmarked)
    rows = rows_of(tokenizer, PLAIN, assistant_turns=mode)
    assert learnt(tokenizer, rows) == expected
    assert [row.split_chats for row in rows if isinstance(row, TokenizedExample)] == [()] * len(expected)
    last = "".join(text for text, _ in parts(tokenizer, rows[-1]))
    assert last.startswith(
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"
    )


def test_a_chat_that_is_no_one_row_is_refused_where_one_row_is_asked_for() -> None:
    (row,) = rows_of("qwen-3", PLAIN, assistant_turns="all")
    assert isinstance(row, BadRow)
    assert "rewrites earlier turns, so that this chat is 2 rows" in row.reason


def test_turns_of_weight_0_are_context_without_marks_too() -> None:
    context = (
        turn("user", "a"),
        Message("assistant", "Hello", learnt=False),
        turn("user", "b"),
        turn("assistant", "Yes"),
    )
    for family, answer in (("phi-4", "Yes<|im_end|>"), ("gpt-oss", f"{HARMONY}Yes<|return|>")):
        for mode in (None, "each", "last", "all"):
            assert learnt(family, rows_of(family, context, assistant_turns=mode)) == [[answer]]
    marked = with_template("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    for tokenizer, mode in (("phi-4", None), ("phi-4", "each"), (marked, "each"), (marked, "last")):
        (row,) = rows_of(tokenizer, context[:2], assistant_turns=mode)
        assert isinstance(row, BadRow)
        assert "expected a turn of the assistant to train on, found the roles user, assistant" in row.reason


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("smollm2", "Hello<|im_end|>"),
        ("qwen-2.5", "Hello<|im_end|>"),
        ("llama-3.1", "Hello<|eot_id|>"),
        ("phi-4-mini", "Hello<|end|>"),
        ("gpt-oss", "Hello<|return|>"),
        ("deepseek-r1", "Hello<｜end▁of▁sentence｜>"),
    ],
)
def test_a_chat_that_the_assistant_begins_is_learnt_from_its_words_on(family: str, expected: str) -> None:
    assert learnt(family, rows_of(family, (turn("assistant", "Hello"), turn("user", "a")))) == [[expected]]


def test_what_the_generation_prompt_supplies_is_not_learnt() -> None:
    """With thinking off, the empty reasoning of the generation prompt is not supervised.

    If the turn's reasoning differs from it, supervision starts after their common prefix.
    """
    off = {"chat_template_kwargs": ("enable_thinking=false",)}
    assert learnt("qwen-3", rows_of("qwen-3", PLAIN, **off)) == [["Hello<|im_end|>"], ["Yes<|im_end|>"]]
    thinking = (turn("user", "a"), turn("assistant", "Yes", reasoning_content="Hm"))
    assert learnt("qwen-3", rows_of("qwen-3", thinking, **off)) == [["Hm\n</think>\n\nYes<|im_end|>"]]


@pytest.mark.parametrize(
    ("opening", "content", "expected"),
    [
        ("<think>\n", "<think>\nHm\n</think>\n\nYes", ("<think>\n", "Hm\n</think>\n\nYes<｜end▁of▁sentence｜>")),
        ("<think>\n", "<think>Hm</think>Yes", ("<think>\n", "Hm</think>Yes<｜end▁of▁sentence｜>")),
        ("<think>\n", "Hm\n</think>\n\nYes", ("<think>\n", "Hm\n</think>\n\nYes<｜end▁of▁sentence｜>")),
        ("<think>\n", "<think>\n\n</think>\n\nYes", ("<｜Assistant｜>", "\n\nYes<｜end▁of▁sentence｜>")),
        ("", "<think>\nHm\n</think>\n\nYes", ("<｜Assistant｜>", "<think>\nHm\n</think>\n\nYes<｜end▁of▁sentence｜>")),
    ],
)
def test_reasoning_that_the_template_drops_is_learnt_behind_the_generation_prompt(
    opening: str, content: str, expected: tuple[str, str]
) -> None:
    tokenizer = copy.copy(tokenizer_of("deepseek-r1"))
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>\\n", opening.replace("\n", "\\n"))
    (row,) = rows_of(tokenizer, (turn("user", "a"), turn("assistant", content)))
    (context, _), (text, _) = parts(tokenizer, row)
    assert context.endswith(expected[0])
    assert text == expected[1]


def test_calls_one_after_another_of_a_template_that_closes_the_answers_between_them() -> None:
    """DeepSeek-R1 closes tool answers unless another call follows.

    The context of a further call therefore ends before the closing tokens.
    """
    messages = (
        turn("user", "a"),
        call('{"q": "x"}'),
        result("41"),
        call('{"q": "y"}'),
        result("42"),
        turn("assistant", "42"),
    )
    found = [text for row in learnt("deepseek-r1", rows_of("deepseek-r1", messages)) for text in row]
    assert found[1] == "\n" + R1_CALL.format('{"q": "y"}')
    assert found[2] == "42<｜end▁of▁sentence｜>"


LINES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (LINES, ["Hello\n", "Yes\n"]),  # a line break ends the turns instead of a token
        (LINES.replace("}}\n", "}}<|im_end|>\n\n"), ["Hello<|im_end|>", "Yes<|im_end|>"]),
        # the generation prompt and the answer start with the same letters
        (LINES.replace("}assistant: ", "}assistant: <Hey>"), ["Hello\n", "Yes\n"]),
        (LINES.replace("}assistant: ", "}assistant: Her"), ["Hello\n", "Yes\n"]),
        # the template has no generation prompt
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}",
            ["assistant: Hello<|im_end|>", "assistant: Yes<|im_end|>"],
        ),
    ],
)
def test_templates_of_no_family(source: str, expected: list[str]) -> None:
    tokenizer = with_template(source)
    assert learnt(tokenizer, rows_of(tokenizer, PLAIN)) == [expected]


def test_a_context_that_is_not_found_again_makes_a_bad_row() -> None:
    tokenizer = with_template(
        "{{ messages | length }}{% for m in messages %}|{{ m.content }}{{ messages | length }}{% endfor %}"
    )
    (row,) = rows_of(tokenizer, PLAIN)
    assert isinstance(row, BadRow)
    assert "turn 2: the rendering with it does not continue the rendering before it" in row.reason


def test_the_day_that_a_template_asks_for_is_pinned() -> None:
    """Rows are the same on every day; the contract stores the date, and an argument changes it."""
    for family, written in (("llama-3.1", "Today Date: 26 Jul 2024\n"), ("gpt-oss", "Current date: 2024-07-26\n")):
        text = "".join(part for part, _ in parts(family, rows_of(family, PLAIN)[0]))
        assert written in text
        settled = LM.settle(Tokenization(9), tokenizer_of(family), chats=True)
        assert settled.chat_template_kwargs == ('strftime_now="2024-07-26"',)
        chosen = {"chat_template_kwargs": ('strftime_now="2025-02-01"',)}
        text = "".join(part for part, _ in parts(family, rows_of(family, PLAIN, **chosen)[0]))
        assert {"llama-3.1": "01 Feb 2025", "gpt-oss": "2025-02-01"}[family] in text
        with pytest.raises(MisuseError, match=r"strftime_now: expected a day as 2024-07-26, found 'today'"):
            rows_of(family, PLAIN, chat_template_kwargs=('strftime_now="today"',))
    own = rows_of("llama-3.1", PLAIN, chat_template_kwargs=('date_string="a day"',))
    assert "Today Date: a day\n" in parts("llama-3.1", own[0])[0][0]
    odd = with_template("{% set form = '%Y' %}{{ strftime_now(form) }}" + LINES)
    with pytest.raises(MisuseError, match="in a format that is not a constant"):
        rows_of(odd, PLAIN)


def test_the_clock_of_a_marked_template_is_left_as_it_was() -> None:
    source = (
        "{{ strftime_now('%Y') }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    tokenizer = with_template(source)
    assert LM.settle(Tokenization(9), tokenizer, chats=True) == Tokenization(9)
    pinned = rows_of(tokenizer, PLAIN, chat_template_kwargs=('strftime_now="1999-01-01"',))
    assert parts(tokenizer, pinned[0])[0][0] == "1999"


def test_arguments_reach_the_template_or_are_refused() -> None:
    high = {"chat_template_kwargs": ('reasoning_effort="high"',)}
    assert "Reasoning: high" in parts("gpt-oss", rows_of("gpt-oss", PLAIN, **high)[0])[0][0]
    with pytest.raises(
        MisuseError, match=r"--chat-template-kwargs effort: .* does not read it; it reads .*reasoning_effort"
    ):
        rows_of("gpt-oss", PLAIN, chat_template_kwargs=("effort=1",))
    with pytest.raises(MisuseError, match="strftime_now: the chat template does not read it"):
        LM.settle(
            Tokenization(9, chat_template_kwargs=('strftime_now="2025-02-01"',)), tokenizer_of("phi-4"), chats=True
        )


@pytest.mark.parametrize(
    ("written", "arguments", "expected"),
    [
        ("{{ a | tojson }}", '{"q": "é"}', '{"q": "é"}'),
        ("{{ a | tojson }}", {"q": "é"}, '{"q": "é"}'),
        ("{% for k, v in a | items %}{{ k }}={{ v }}{% endfor %}", '{"q": "é"}', "q=é"),
        ("{{ a + '' }}", {"q": "é"}, '{"q": "é"}'),
        ("{{ a }}", {"q": "é"}, '{"q": "é"}'),
        ("{{ a }}", '{"q":"é"}', '{"q":"é"}'),
        ("{{ a }}", {}, "{}"),
        ("{{ a if a is string else a | tojson }}", '{"q":"é"}', '{"q":"é"}'),
    ],
)
def test_arguments_of_a_call_are_given_in_the_form_that_the_template_takes(
    written: str, arguments: Any, expected: str
) -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.content or '' }}{% for c in m.tool_calls or [] %}{% set a = c.function.arguments %}"
        + written
        + "{% endfor %}<|im_end|>{% endfor %}"
    )
    tokenizer = with_template(source)
    (found,) = learnt(tokenizer, rows_of(tokenizer, (turn("user", "a"), call(arguments))))
    assert found == [f"<|im_start|>{expected}<|im_end|>"]


def test_arguments_that_no_form_fits_are_a_bad_row() -> None:
    (row,) = rows_of("llama-3.1", (turn("user", "a"), call("no object")))
    assert isinstance(row, BadRow)
    assert "turn 1: the chat template quotes arguments of a tool call" in row.reason


def test_a_tool_turn_may_name_its_call_and_its_tool() -> None:
    messages = (*CALLS[:2], Message("tool", "42", {"tool_call_id": "abcdefghi", "name": "find"}), CALLS[3])
    assert learnt("qwen-2.5", rows_of("qwen-2.5", messages))[0][1] == "It is 42<|im_end|>"


def test_a_template_for_tools_is_taken_where_there_are_tools() -> None:
    plain = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = with_template(plain)
    tokenizer.chat_template = {"default": plain, "tool_use": "{{ tools | tojson }}" + plain}
    chat = (turn("user", "a"), turn("assistant", "Yes"))
    for tools, first in ((None, "a<|im_end|>"), (TOOLS, json.dumps(list(TOOLS)) + "a<|im_end|>")):
        assert parts(tokenizer, rows_of(tokenizer, chat, tools)[0])[0][0] == first


def test_no_chat_template_is_refused_with_what_to_do() -> None:
    tokenizer = with_template(LINES)
    tokenizer.chat_template = None
    with pytest.raises(SourceError, match="has no chat template; give one with --chat-template FILE"):
        rows_of(tokenizer, PLAIN)
    with pytest.raises(SourceError, match="cannot be read"):
        rows_of(with_template("{% if %}"), PLAIN)


@pytest.mark.parametrize("packing", [False, True])
def test_a_chat_is_cut_on_the_side_that_is_asked_for(packing: bool) -> None:
    """Cutting on the left keeps BOS; supervised tokens that are cut are counted."""
    tokenizer = tokenizer_of("gemma-3")
    (whole,) = rows_of(tokenizer, PLAIN[1:])
    assert isinstance(whole, TokenizedExample)
    ids = [*whole.input_ids.tolist(), *[tokenizer.eos_token_id] * packing]  # EOS, which ends no turn of Gemma's
    for side, kept in ((None, ids[:-8]), ("left", [ids[0], *ids[9:]])):
        (row,) = rows_of(tokenizer, PLAIN[1:], length=len(ids) - 8, truncation_side=side, packing=packing)
        assert isinstance(row, TokenizedExample)
        assert row.input_ids.tolist() == kept
        lost = whole.num_positions - row.num_positions
        assert row.cut == (Cut(7, 8, lost),)
        assert bool(lost) == (side is None)
    (short,) = rows_of(tokenizer, PLAIN[1:], length=20, truncation_side="left")
    assert isinstance(short, TokenizedExample)
    assert short.cut[0].supervised > 0
    assert not short.supervised[0]  # the first token after BOS has lost its context


def test_rows_of_chats_may_be_packed() -> None:
    """Every turn occurs once, counts are of whole chats, and no two rows share a key."""
    examples = [Example(i, messages=PLAIN) for i in range(5)]
    packed = Tokenization(500, packing=True)
    rows = list(LM.tokenize(examples, "train", tokenizer_of("gpt-oss"), packed))
    said = [text for row in learnt("gpt-oss", rows) for text in row]
    assert said == [f"{HARMONY}Hello<|return|>", f"{HARMONY}Yes<|return|>"] * 5
    good = [row for row in rows if isinstance(row, TokenizedExample)]
    assert len({(row.source_row, row.piece) for row in good}) == len(good) < 10
    assert [count for row in good for count in row.split_chats] == [2] * 5


def test_turns_that_are_cut_away_are_bad_rows_of_their_own() -> None:
    rows = rows_of("gpt-oss", (*PLAIN[:3], turn("user", "b" * 300), turn("assistant", "Yes")), length=200)
    assert isinstance(rows[0], TokenizedExample)
    assert isinstance(rows[1], BadRow)
    assert "no token to predict is left within --max-length 200" in rows[1].reason
    left = rows_of("gpt-oss", (turn("user", "b" * 300), turn("assistant", "Yes")), length=200, truncation_side="left")
    assert learnt("gpt-oss", left) == [[f"{HARMONY}Yes<|return|>"]]


@pytest.mark.parametrize(
    ("columns", "given", "flag"),
    [
        (Columns(), {"assistant_turns": "each"}, "--assistant-turns"),
        (Columns(), {"chat_template_kwargs": ("a=1",)}, "--chat-template-kwargs"),
        (Columns(), {"truncation_side": "left"}, "--truncation-side"),
        (Columns(text=None, input_ids="ids"), {"truncation_side": "left"}, "--truncation-side"),
    ],
)
def test_settings_that_have_no_effect_on_an_input_are_refused(columns: Columns, given: Any, flag: str) -> None:
    with pytest.raises(MisuseError, match=f"{flag} goes with"):
        LM.check_columns(columns, Tokenization(9, **given))
    with pytest.raises(MisuseError, match="are for the chats of language models"):
        get_task("sequence-classification").check_columns(Columns(), Tokenization(9, **given))
    LM.check_columns(Columns(text=None, messages="chat"), Tokenization(9, **given))


def test_what_a_contract_says_of_chats() -> None:
    marked = with_template("{% generation %}{{ messages[0].content }}{% endgeneration %}")
    for mode, unmarked_says, marked_says in (
        (None, "auto", None),
        ("all", "all", None),
        ("each", "each", "each"),
        ("last", "last", "last"),
    ):
        wanted = Tokenization(9, assistant_turns=mode)
        assert LM.settle(wanted, tokenizer_of("phi-4"), chats=True).assistant_turns == unmarked_says
        assert LM.settle(wanted, marked, chats=True).assistant_turns == marked_says
    assert LM.settle(Tokenization(9), tokenizer_of("phi-4"), chats=False) == Tokenization(9)
    with pytest.raises(MisuseError, match="the prompts of this data set are plain text"):
        LM.settle(Tokenization(9, assistant_turns="last"), tokenizer_of("phi-4"), chats=False)


def test_what_decides_is_said_with_the_reason() -> None:
    def said(tokenizer: Any, mode: Any = None) -> str:
        return supervision(LM.settle(Tokenization(9, assistant_turns=mode), tokenizer, chats=True), tokenizer)

    assert "as few rows as possible, with each turn in its context at inference" in said(tokenizer_of("phi-4"))
    assert "(--assistant-turns last)" in said(tokenizer_of("phi-4"), "last")
    assert 'the date is always strftime_now="2024-07-26"' in said(tokenizer_of("gpt-oss"))
    assert "has no generation prompt, so that the header of a turn is trained on too" in said(
        tokenizer_of("mistral-v0.3")
    )
    marked = with_template("{% generation %}{{ messages[0].content }}{% endgeneration %}")
    assert said(marked) == "the chat template marks the assistant's tokens"
    dated = with_template("{{ strftime_now('%Y') }}{% generation %}{{ messages[0].content }}{% endgeneration %}")
    assert "rows contain the current date" in said(dated)
    assert "marks the assistant's tokens; each turn is a row" in said(marked, "each")


def test_the_page_on_chats_has_every_family() -> None:
    page = (Path(__file__).parents[2] / "docs" / "chats.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w.-]+)` \| ", page, flags=re.MULTILINE)
    assert listed == list(FAMILIES)
