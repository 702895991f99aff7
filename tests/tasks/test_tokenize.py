"""Texts, chats and prompts as rows: every token is predicted once, and no other position is."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import MisuseError
from pipeline.records import BadRow, Columns, Cut, Example, Message, Tokenization
from pipeline.tasks import get_task
from tests.conftest import sentence
from tests.support.profile import examples

LM, CLASSIFIER = get_task("causal-lm"), get_task("sequence-classification")

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %} {% endfor %}"
)


_SESSION: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _share_tokenizer(lm_tokenizer):
    """Share the session's tokenizer with hypothesis tests, which take no function fixtures."""
    _SESSION["tokenizer"] = lm_tokenizer


def _tokenizer() -> Any:
    return _SESSION["tokenizer"]


def _with_template(template: str) -> Any:
    tokenizer = copy.deepcopy(_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def texts(count: int, seed: int = 0, most: int = 60) -> list[Example]:
    rng = random.Random(seed)
    return [Example(source_row=i, text=sentence(rng, rng.randint(1, most))) for i in range(count)]


def predicted_tokens(row) -> list[int]:
    return row.input_ids[np.flatnonzero(row.supervised) + 1].tolist()


@settings(deadline=None, max_examples=examples(30, 300))
@given(st.integers(2, 40), st.integers(0, 1000))
def test_pieces_predict_every_token_but_the_first_once(longest, seed):
    tokenizer = _tokenizer()
    examples = texts(5, seed)
    rows = list(LM.tokenize(examples, "train", tokenizer, Tokenization(longest)))
    for example in examples:
        mine = [row for row in rows if row.source_row == example.source_row]
        ids = tokenizer(example.text)["input_ids"]
        if len(ids) < 2:
            assert isinstance(mine[0], BadRow)
            continue
        assert [row.piece for row in mine] == list(range(len(mine)))
        assert all(row.num_tokens <= longest for row in mine)
        assert [token for row in mine for token in predicted_tokens(row)] == ids[1:]
        first = len(tokenizer.decode(ids[:1]).encode())
        assert sum(row.text_bytes for row in mine) == len(example.text.encode()) - first


@settings(deadline=None, max_examples=examples(30, 300))
@given(st.integers(4, 60), st.booleans(), st.integers(0, 1000))
def test_packed_rows_predict_every_token_but_the_documents_first_once(longest, isolate, seed):
    tokenizer = _tokenizer()
    examples = [e for e in texts(8, seed) if len(tokenizer(e.text)["input_ids"]) > 1]
    rows = list(
        LM.tokenize(examples, "train", tokenizer, Tokenization(longest, packing=True, isolate_documents=isolate))
    )
    assert all(row.num_tokens <= longest for row in rows)
    assert len({(row.source_row, row.piece) for row in rows}) == len(rows)
    wanted = [token for e in examples for token in [*tokenizer(e.text)["input_ids"][1:], tokenizer.eos_token_id]]
    assert [token for row in rows for token in predicted_tokens(row)] == wanted
    full = [row.num_tokens for row in rows[:-1]]
    assert all(length >= longest - 1 for length in full)
    if isolate:
        assert all(row.document_lengths.sum() == row.num_tokens for row in rows)


def test_isolated_documents_start_their_positions_anew(lm_tokenizer):
    rows = list(LM.tokenize(texts(8), "train", lm_tokenizer, Tokenization(50, packing=True, isolate_documents=True)))
    inputs, supervised = LM.collate(rows, 0)
    assert "attention_mask" not in inputs
    for row, positions in zip(rows, inputs["position_ids"].tolist(), strict=True):
        expected = [p for length in row.document_lengths for p in range(length)]
        assert positions[: row.num_tokens] == expected
    assert supervised.sum() == sum(row.num_positions for row in rows)


def test_bytes_count_characters_of_any_width(lm_tokenizer):
    text = "caf\u00e9 \u20ac5 \U0001f600 na\u00efve"
    rows = list(LM.tokenize([Example(0, text=text)], "train", lm_tokenizer, Tokenization(200)))
    ids = lm_tokenizer(text)["input_ids"]
    assert rows[0].text_bytes == len(text.encode()) - len(lm_tokenizer.decode(ids[:1]).encode())


def test_a_chat_supervises_the_assistants_tokens_and_no_others():
    tokenizer = _with_template(TEMPLATE)
    messages = (
        Message("user", "the cat"),
        Message("assistant", "sat on"),
        Message("user", "and then"),
        Message("assistant", "ran home"),
    )
    row = next(iter(LM.tokenize([Example(3, messages=messages)], "train", tokenizer, Tokenization(100))))
    assert tokenizer.decode(predicted_tokens(row)) == "sat on<eos>ran home<eos>"
    assert row.source_row == 3
    assert row.text_bytes == len("sat on") + len("ran home")


def test_a_prompt_supervises_its_completion_and_eos(lm_tokenizer):
    row = next(
        iter(
            LM.tokenize(
                [Example(0, prompt_completion=("the cat ", "sat on the mat"))], "train", lm_tokenizer, Tokenization(100)
            )
        )
    )
    assert lm_tokenizer.decode(predicted_tokens(row)) == "sat on the mat<eos>"


def test_a_prompt_longer_than_the_row_leaves_nothing_to_learn(lm_tokenizer):
    long = Example(7, prompt_completion=("the cat sat on the mat and then ran home " * 5, "yes"))
    found = list(LM.tokenize([long], "train", lm_tokenizer, Tokenization(20)))
    assert isinstance(found[0], BadRow)
    assert found[0].source_row == 7
    assert "--max-length 20" in found[0].reason


def test_packed_prompts_keep_their_completion_and_end_once(lm_tokenizer):
    pairs = [("the cat ", "sat on"), ("old and new ", "river"), ("the dog ", "ran home and then flew")]
    examples = [Example(i, prompt_completion=pair) for i, pair in enumerate(pairs)]
    rows = list(LM.tokenize(examples, "train", lm_tokenizer, Tokenization(24, packing=True)))
    found = "".join(lm_tokenizer.decode(predicted_tokens(row)) for row in rows)
    assert found == "sat on<eos>river<eos>ran home and then flew<eos>"
    for row in rows:  # a row starts with a prompt, never inside a completion
        assert lm_tokenizer.decode(row.input_ids.tolist()).startswith(tuple(prompt for prompt, _ in pairs))
    long = Example(9, prompt_completion=("the cat sat on the mat and then ran home " * 5, "yes"))
    assert isinstance(next(iter(LM.tokenize([long], "train", lm_tokenizer, Tokenization(24, packing=True)))), BadRow)


def test_a_template_that_refuses_a_chat_and_ids_of_another_tokenizer_are_bad_rows(lm_tokenizer):
    tokenizer = _with_template("{% generation %}{{ raise_exception('roles must alternate') }}{% endgeneration %}")
    found = list(
        LM.tokenize([Example(4, messages=(Message("assistant", "sat"),))], "train", tokenizer, Tokenization(24))
    )
    assert isinstance(found[0], BadRow)
    assert "roles must alternate" in found[0].reason
    found = list(LM.tokenize([Example(5, input_ids=(7, 9000))], "train", lm_tokenizer, Tokenization(24)))
    assert isinstance(found[0], BadRow)
    assert "9000" in found[0].reason


def test_pretokenized_rows_learn_where_the_label_is_not_minus_100(lm_tokenizer):
    ids, labels = (5, 6, 7, 8, 9), (-100, -100, 7, -100, 9)
    row = next(
        iter(LM.tokenize([Example(0, input_ids=ids, token_labels=labels)], "train", lm_tokenizer, Tokenization(100)))
    )
    assert row.supervised.tolist() == [False, True, False, True, False]
    row = next(iter(LM.tokenize([Example(0, input_ids=ids)], "train", lm_tokenizer, Tokenization(100))))
    assert row.supervised.tolist() == [True] * 4 + [False]


def test_bad_rows_pass_through_in_their_place(lm_tokenizer, bert_tokenizer):
    bad = BadRow("train", 1, "empty text")
    for task, tokenizer in ((LM, lm_tokenizer), (CLASSIFIER, bert_tokenizer)):
        found = list(
            task.tokenize(
                [Example(0, text="the cat sat"), bad, Example(2, text="the dog ran")],
                "train",
                tokenizer,
                Tokenization(30),
            )
        )
        assert found[1] == bad
        assert [item.source_row for item in found] == [0, 1, 2]


def test_classifier_pairs_truncate_and_carry_token_types(bert_tokenizer):
    rows = list(
        CLASSIFIER.tokenize(
            [Example(0, text="the cat " * 40, text_pair="the dog", label=2)], "train", bert_tokenizer, Tokenization(16)
        )
    )
    assert rows[0].num_tokens == 16
    assert set(rows[0].token_type_ids.tolist()) == {0, 1}
    assert CLASSIFIER.hard_labels(rows[:1]).tolist() == [2]


@pytest.mark.parametrize(
    ("task", "columns", "settings", "flag"),
    [
        (CLASSIFIER, Columns(text=None, messages="chat"), Tokenization(9), "--text-column"),
        (CLASSIFIER, Columns(), Tokenization(9, packing=True), "--packing"),
        (LM, Columns(text_pair="b"), Tokenization(9), "--text-pair-column"),
        (LM, Columns(keep=("id",)), Tokenization(9, packing=True), "--keep-column"),
    ],
)
def test_inputs_of_the_other_task_are_refused(task, columns, settings, flag):
    with pytest.raises(MisuseError, match=flag):
        task.check_columns(columns, settings)


@pytest.mark.parametrize("packing", [False, True])
def test_what_is_cut_off_is_counted_by_source_row(lm_tokenizer, packing):
    """Prompts lose their end; plain texts continue in the next piece and lose nothing."""
    completion = "cat sat on the mat and then ran home"
    whole = len(lm_tokenizer("the dog")["input_ids"]) + len(lm_tokenizer(completion)["input_ids"]) + 1  # and EOS
    examples = [
        Example(source_row=0, prompt_completion=("the dog", completion)),
        Example(source_row=1, prompt_completion=("the dog", "sat")),
    ]
    rows = list(LM.tokenize(examples, "train", lm_tokenizer, Tokenization(8, packing=packing)))
    assert [cut for row in rows for cut in row.cut] == [Cut(0, whole - 8, whole - 8)]
    long = texts(5, most=60)
    assert not any(row.cut for row in LM.tokenize(long, "train", lm_tokenizer, Tokenization(8, packing=packing)))


def test_a_classifiers_row_says_how_many_tokens_it_lost(bert_tokenizer):
    examples = [
        Example(source_row=0, text="the cat " * 10),
        Example(source_row=1, text="a dog"),
        Example(source_row=2, text="the cat sat on the hill"),  # 8 tokens, the maximum
    ]
    rows = list(CLASSIFIER.tokenize(examples, "train", bert_tokenizer, Tokenization(8)))
    assert [row.cut for row in rows] == [(Cut(0, 22 - 8),), (), ()]
