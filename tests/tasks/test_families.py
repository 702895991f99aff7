"""Bytes, spans, BOS and EOS against the tokenizer's own offsets, over families of tokenizers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import SourceError
from pipeline.records import BadRow, Example, Message, Tokenization, TokenizedExample
from pipeline.tasks import get_task
from pipeline.tasks.documents import overlapping
from pipeline.tasks.pieces import read_vocabulary
from tests.support.profile import examples
from tests.tasks.families import FAMILIES

LM = get_task("causal-lm")
LONG = Tokenization(4000)
each_family = pytest.mark.parametrize("family", FAMILIES)
#: Words, whitespace, line breaks, other scripts, emoji, combining marks, ligatures.
PARTS = [
    "the",
    "cat",
    "2+2=",
    "4",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "é",
    "e\u0301",
    "日本",
    "🐕",
    "👩\u200d🔬",
    "ﬁ",
    "½",
    "'t",
]
a_text = st.lists(st.sampled_from(PARTS), min_size=1, max_size=12).map("".join)
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}<|user|>{{ m.content }}<|user|>{% endif %}{% endfor %}"
)


def row_of(family: str, template: str | None = None, **fields: Any) -> TokenizedExample | BadRow:
    tokenizer: Any = FAMILIES[family]
    if template is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    return next(iter(LM.tokenize([Example(0, **fields)], "train", tokenizer, LONG)))


def good(family: str, template: str | None = None, **fields: Any) -> TokenizedExample:
    row = row_of(family, template, **fields)
    assert isinstance(row, TokenizedExample), row
    return row


def predicted(row: TokenizedExample) -> list[int]:
    assert row.supervised is not None
    return row.input_ids[np.flatnonzero(row.supervised) + 1].tolist()


@each_family
@settings(deadline=None, max_examples=examples(25, 250))
@given(a_text)
def test_tokens_stand_for_every_byte_of_a_text_once(family: str, text: str) -> None:
    tokenizer: Any = FAMILIES[family]
    vocabulary = read_vocabulary(tokenizer)
    ids, num_bytes, offsets = vocabulary.encode(text)
    assert vocabulary.enclose(ids, num_bytes)[0].tolist() == tokenizer(text)["input_ids"]
    assert (num_bytes >= 0).all()
    covered = text if offsets and offsets[-1][1] == len(text) else text.rstrip()
    if len(ids):
        assert (
            len(covered.encode()) - len(text) * (family in ("bert", "t5", "deberta"))
            <= num_bytes.sum()
            <= len(text.encode())
        )
    if family not in ("bert", "t5", "deberta", "qwen"):  # these change the text
        assert num_bytes.sum() == len(text.encode())
        for i in range(len(ids) - 1):  # up to any token; offsets of whitespace may be trimmed
            if offsets[i + 1][0] >= offsets[i][1] > offsets[i][0]:
                assert num_bytes[: i + 1].sum() == len(text[: offsets[i][1]].encode())
        if not text.startswith((" ", "\n", "\t", "\r")):
            assert vocabulary.bytes_of_ids(ids).tolist() == num_bytes.tolist()


@pytest.mark.parametrize(
    ("family", "text", "expected"),
    [
        ("gpt2", "日 cat", [1, 1, 1, 4]),
        ("mistral", "日 the", [0, 1, 1, 1, 4]),
        ("bert", "the  cat ", [3, 5]),
        ("qwen", "e\u0301 e\u0301", [1, 2, 1, 1, 2]),
        ("gpt2", "the<|user|>cat", [3, 0, 3]),
    ],
)
def test_bytes_of_tokens(family: str, text: str, expected: list[int]) -> None:
    assert read_vocabulary(FAMILIES[family]).encode(text)[1].tolist() == expected


@each_family
@pytest.mark.parametrize("text", ["the cat sat", "日本 cat", "2+2=4 🐕🐕"])
def test_text_bytes_of_a_row_is_the_text_that_is_predicted(family: str, text: str) -> None:
    """Checks a text, a prompt and a chat.

    The document's first token is predicted only if BOS precedes it.
    """
    tokenizer: Any = FAMILIES[family]
    row = good(family, text=text)
    first = (
        0
        if tokenizer(text)["input_ids"][0] == tokenizer.bos_token_id
        else read_vocabulary(tokenizer).encode(text)[1][0]
    )
    assert row.text_bytes == len(text.encode()) - first
    answer = (Message("user", "the"), Message("assistant", text))
    assert good(family, CHAT, messages=answer).text_bytes == len(text.encode())
    assert good(family, prompt_completion=("the<|user|>", text)).text_bytes == len(text.encode())


@each_family
@settings(deadline=None, max_examples=examples(15, 150))
@given(st.lists(st.sampled_from(["a", "dog", "cat ", " mat", "🐕", "日\n", ""]), min_size=2, max_size=5))
def test_the_assistants_tokens_are_those_that_cover_its_characters(family: str, contents: list[str]) -> None:
    messages = tuple(Message("user" if i % 2 else "assistant", text) for i, text in enumerate(contents))
    row = row_of(family, CHAT, messages=messages)
    if isinstance(row, BadRow):
        return
    tokenizer: Any = FAMILIES[family]
    text, spans = str(tokenizer.bos_token or ""), []
    for message in messages:
        whole = message.content if message.role == "assistant" else f"<|user|>{message.content}<|user|>"
        spans += [range(len(text), len(text) + len(whole))] if message.role == "assistant" else []
        text += whole
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert row.input_ids.tolist() == encoded["input_ids"]
    assert row.supervised is not None
    for i, (start, stop) in enumerate(encoded["offset_mapping"][1:]):
        if start < stop:
            assert row.supervised[i] == any(set(span) & set(range(start, stop)) for span in spans)


def test_a_span_that_ends_at_the_first_token_or_at_stripped_white_space_ends_there() -> None:
    assert overlapping([(0, 1), (1, 5), (5, 8)], [(0, 1)]).tolist() == [True, False, False]
    assert overlapping([(0, 3), (4, 7), (8, 9)], [(4, 8)]).tolist() == [False, True, False]
    assert overlapping([(0, 1), (0, 1), (1, 2), (1, 2)], [(1, 2)]).tolist() == [False, False, True, True]
    assert overlapping([(0, 3), (4, 4), (5, 8)], [(3, 4)]).tolist() == [False, True, False]


@each_family
def test_a_text_a_prompt_and_a_chat_have_one_bos_and_one_eos(family: str) -> None:
    tokenizer: Any = FAMILIES[family]
    bos, eos = tokenizer.bos_token, tokenizer.eos_token_id
    adds_bos = bos is not None and tokenizer("the")["input_ids"][0] == tokenizer.bos_token_id
    written = str(bos) if adds_bos else ""
    for plain, marked in (
        ({"text": "the cat"}, {"text": f"{written}the cat"}),
        ({"prompt_completion": ("the<|user|>", "cat")}, {"prompt_completion": (f"{written}the<|user|>", "cat</s>")}),
    ):
        ids = good(family, **marked).input_ids.tolist()
        assert ids.count(tokenizer.bos_token_id) == int(adds_bos)
        assert len(ids) == len(good(family, **plain).input_ids)
    assert good(family, **marked).input_ids.tolist().count(eos) == 1
    start = CHAT.replace("<|user|>", "", 1)
    chat = good(family, start, messages=(Message("user", str(bos or "")), Message("assistant", "cat")))
    assert chat.input_ids.tolist().count(tokenizer.bos_token_id) == int(bos is not None)


def test_a_packed_chat_that_the_template_closes_gets_no_second_eos() -> None:
    tokenizer: Any = copy.copy(FAMILIES["gpt2"])
    tokenizer.chat_template = CHAT + "{{ eos_token + '\n' }}"
    chats = [Example(i, messages=(Message("user", "the"), Message("assistant", "cat"))) for i in range(2)]
    (row,) = LM.tokenize(chats, "train", tokenizer, Tokenization(100, packing=True))
    assert isinstance(row, TokenizedExample)
    assert row.input_ids.tolist().count(tokenizer.eos_token_id) == 2


@pytest.mark.parametrize("family", ["llama2", "mistral", "t5", "bert", "prefix-space"])
@pytest.mark.parametrize(
    ("prompt", "completion"), [("2+2=", "4"), ("the cat", " sat"), ("the cat ", "sat"), ("", "cat")]
)
def test_prompt_and_completion_join_as_their_text_does(family: str, prompt: str, completion: str) -> None:
    tokenizer: Any = FAMILIES[family]
    row = good(family, prompt_completion=(prompt, completion))
    whole = tokenizer(prompt + completion)["input_ids"]
    assert [i for i in row.input_ids.tolist() if i != tokenizer.eos_token_id] == [
        i for i in whole if i != tokenizer.eos_token_id
    ]
    assert tokenizer.decode(predicted(row), skip_special_tokens=True).strip().endswith(completion.strip()[-1])


def test_a_token_that_begins_in_the_prompt_is_the_prompts() -> None:
    """A token belongs to the prompt if more than its leading whitespace is in the prompt."""
    vocabulary = read_vocabulary(FAMILIES["mistral"])
    row = row_of("mistral", prompt_completion=("the c", "at"))
    pieces = FAMILIES["mistral"].convert_ids_to_tokens(vocabulary.encode("the cat")[0].tolist())
    assert pieces[-1] == "▁cat"
    assert isinstance(row, BadRow)
    assert "the tokenizer merges the completion into the prompt" in row.reason


@pytest.mark.parametrize("family", ["gpt2", "roberta", "qwen"])
def test_byte_level_prompts_are_tokenized_apart(family: str) -> None:
    tokenizer: Any = FAMILIES[family]
    row = good(family, prompt_completion=("the c", "at"))
    after = tokenizer("at", add_special_tokens=False)["input_ids"]
    assert predicted(row) == [*after, tokenizer.eos_token_id]


CONTEXT = (Message("user", "the"), Message("assistant", "cat", learnt=False), Message("assistant", "mat"))


def test_turns_of_weight_0_are_context() -> None:
    row = good("gpt2", CHAT, messages=CONTEXT)
    assert FAMILIES["gpt2"].decode(predicted(row)) == "mat"
    twice = CHAT.replace(
        "{{ m.content }}{% endgeneration %}", "{% endgeneration %}{% generation %}x{% endgeneration %}"
    )
    row_or_bad = row_of("gpt2", twice, messages=CONTEXT)
    assert isinstance(row_or_bad, BadRow)
    assert "marks 4 parts for 2 turns" in row_or_bad.reason


@pytest.mark.parametrize(
    ("fields", "reads", "refused"),
    [
        ({"name": "x"}, "", "turn 1: the chat template does not read the key 'name'"),
        ({"name": "x"}, "{{ m.name }}", None),
        ({"name": "x"}, "{{ m['name'] }}", None),
        ({"name": "x"}, "{{ m.get('name') }}", None),
        ({"name": "x"}, "{{ m | tojson }}", None),
        ({"name": "x"}, "{% for t in m.tool_calls %}{{ t.name }}{% endfor %}", "the key 'name'"),
        ({"name": "x"}, "{% set turn = messages[-1] %}{{ turn.name }}", None),
        ({"reasoning_content": "x"}, "{% if false %}{{ m.reasoning_content }}{% endif %}", None),
        ({"function_call": {"name": "f"}}, "{{ m.tool_calls }}", "the key 'function_call'"),
        ({"tool_calls": [{"function": {"arguments": "{}"}}]}, "{{ m.tool_calls[0].function.arguments }}", None),
        (
            {"tool_calls": [{"function": {"arguments": '{"a": 1}'}}]},
            "{{ m.tool_calls[0].function.arguments | tojson }}",
            None,
        ),
    ],
)
def test_keys_of_a_turn_that_the_template_does_not_read_are_refused(
    fields: dict[str, Any], reads: str, refused: str | None
) -> None:
    template = CHAT.replace("{% generation %}", "{% generation %}" + reads)
    row = row_of("gpt2", template, messages=(Message("user", "the"), Message("assistant", "cat", fields)))
    assert isinstance(row, BadRow) == (refused is not None)
    if isinstance(row, BadRow) and refused is not None:
        assert refused in row.reason


def test_tools_reach_the_template_or_are_refused() -> None:
    messages, tools = (Message("assistant", "cat"),), ({"name": "f"},)
    row = good("gpt2", "{{ tools | tojson }}" + CHAT, messages=messages, tools=tools)
    assert FAMILIES["gpt2"].decode(row.input_ids).startswith('[{"name": "f"}]')
    refused = row_of("gpt2", CHAT, messages=messages, tools=tools)
    assert isinstance(refused, BadRow)
    assert "does not read the column tools" in refused.reason


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% macro a(m) %}{% generation %}{{ m }}{% endgeneration %}{% endmacro %}{{ a('x') }}", "inside a macro"),
    ],
)
def test_marks_that_cannot_be_used_are_refused(template: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        row_of("gpt2", template, messages=(Message("assistant", "cat"),))


@pytest.mark.parametrize("word", ["{# {% generation %} #}", "{{ 'generation' }}"])
def test_the_word_generation_alone_is_no_mark(word: str) -> None:
    messages = (Message("user", "the|"), Message("assistant", "cat"))
    row = good("gpt2", word + "{% for m in messages %}{{ m.content }}{% endfor %}", messages=messages)
    assert FAMILIES["gpt2"].decode(predicted(row)) == "cat"


def test_padding_that_is_learnt_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer: Any = FAMILIES["gpt2"]
    pad = tokenizer.pad_token_id
    rows = [(9, 8, pad, pad), (pad, pad, 9, 8), (9, 8, 7, pad), (9, pad, pad, 8)]
    list(LM.tokenize([Example(i, input_ids=ids) for i, ids in enumerate(rows)], "train", tokenizer, LONG))
    assert "2 of 4 rows begin or end with the pad token" in caplog.text
    caplog.clear()
    masked = [Example(i, input_ids=(9, 8, pad, pad), token_labels=(9, 8, -100, -100)) for i in range(2)]
    list(LM.tokenize(masked, "train", tokenizer, LONG))
    assert not caplog.text
