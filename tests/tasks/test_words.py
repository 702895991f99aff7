"""Rows of words: each word has a position at its first token, and its label there."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForTokenClassification, set_seed

from pipeline.errors import MisuseError
from pipeline.records import NO_LABEL, BadRow, Columns, Cut, Example, Predictions, Tokenization, TokenizedExample
from pipeline.tasks import get_task
from tests.conftest import TINY
from tests.support.profile import examples

TASK = get_task("token-classification")
_SESSION: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _share(bert_tokenizer, lm_tokenizer):
    _SESSION.update(bert=bert_tokenizer, lm=lm_tokenizer)


def tokenize(tokenizer: Any, *rows: tuple[str, ...], max_length: int = 64, labels: Any = None) -> list[Any]:
    given = [Example(i, words=words, word_labels=None if labels is None else labels[i]) for i, words in enumerate(rows)]
    return list(TASK.tokenize(given, "train", tokenizer, Tokenization(max_length)))


def test_a_word_is_at_its_first_token(bert_tokenizer):
    (row,) = tokenize(bert_tokenizer, ("the", "catdog", "sat"), labels=[(0, 1, 2)])
    names = bert_tokenizer.convert_ids_to_tokens(row.input_ids)
    assert names[0] == "[CLS]"
    assert names[-1] == "[SEP]"
    assert [name for name, mark in zip(names, row.supervised, strict=True) if mark] == ["the", "cat", "sat"]
    assert row.labels.tolist() == [0, 1, 2]
    assert row.words == ("the", "catdog", "sat")
    assert row.num_positions == 3


@settings(max_examples=examples(40, 400), deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=6), min_size=1, max_size=8),
    st.booleans(),
)
def test_every_word_has_a_position(words, is_bert):
    words = [word for word in words if not word.isspace()]
    if not words:
        return
    tokenizer = _SESSION["bert" if is_bert else "lm"]
    (row,) = tokenize(tokenizer, tuple(words), max_length=1000)
    assert row.num_positions == len(words) == len(row.labels)
    assert set(row.labels.tolist()) == {NO_LABEL}


def test_byte_level_words_have_the_tokens_of_the_text(lm_tokenizer):
    """Without `add_prefix_space` the words of a list would be tokenized as a single word."""
    words = ("the", "cat", "sat", "on", "mats")
    (row,) = tokenize(lm_tokenizer, words)
    assert row.input_ids.tolist() == lm_tokenizer(" ".join(words))["input_ids"]
    (plain,) = tokenize(_SESSION["bert"], words)
    assert plain.input_ids.tolist() == _SESSION["bert"](" ".join(words))["input_ids"]


def test_a_word_of_no_token_is_the_unknown_one(bert_tokenizer):
    (row,) = tokenize(bert_tokenizer, ("the", "\u200d", "cat"), labels=[(0, 1, 2)])
    names = bert_tokenizer.convert_ids_to_tokens(row.input_ids[row.supervised])
    assert names == ["the", "[UNK]", "cat"]
    assert row.words == ("the", "\u200d", "cat")
    without = copy.deepcopy(bert_tokenizer)
    without.unk_token = None
    (row,) = tokenize(without, ("the", "\u200d", "cat"))
    assert isinstance(row, BadRow)
    assert row.reason.startswith("word 1, '\\u200d': the tokenizer makes no token of it")


def test_words_beyond_the_longest_row_are_cut(bert_tokenizer):
    (row,) = tokenize(bert_tokenizer, ("the", "cat", "sat", "on"), max_length=4, labels=[(0, 1, NO_LABEL, 1)])
    assert row.words == ("the", "cat")
    assert row.labels.tolist() == [0, 1]
    assert row.cut == (Cut(0, 2, 1),)
    (bad,) = tokenize(bert_tokenizer, ("the", "cat"), max_length=2)
    assert bad == BadRow("train", 0, "no word is left within --max-length 2")


def test_the_first_words_are_kept_whichever_end_the_tokenizer_cuts(bert_tokenizer):
    left = copy.deepcopy(bert_tokenizer)
    left.truncation_side = "left"
    rows = [tokenize(each, ("the", "cat", "sat"), max_length=4, labels=[(0, 1, 2)]) for each in (left, bert_tokenizer)]
    found, expected = (row for (row,) in rows)
    assert found.input_ids.tolist() == expected.input_ids.tolist()
    assert (found.words, found.labels.tolist()) == (("the", "cat"), [0, 1])
    assert left.truncation_side == "left"


def test_texts_are_split_into_words(bert_tokenizer):
    given = [Example(0, text="the cat, sat"), Example(1, text=" \n"), BadRow("train", 2, "no")]
    first, second, third = TASK.tokenize(given, "train", bert_tokenizer, Tokenization(64))
    assert isinstance(first, TokenizedExample)
    assert first.words == ("the", "cat", ",", "sat")
    assert second == BadRow("train", 1, "the text has no words")
    assert third.reason == "no"


def test_one_label_for_all_words_is_refused(bert_tokenizer):
    with pytest.raises(
        MisuseError, match="row 0 has one label for the whole row; expected a list of labels, one a word"
    ):
        list(TASK.tokenize([Example(0, text="the cat", label=1)], "train", bert_tokenizer, Tokenization(64)))
    given = [Example(0, text="so"), Example(1, text="the", words=("the",), word_labels=(0,))]
    with pytest.raises(MisuseError, match="give --task token-classification"):
        list(get_task("sequence-classification").tokenize(given, "train", bert_tokenizer, Tokenization(64)))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("causal-lm", "--words-column is for token classification"),
        ("sequence-classification", "for words give --task token-classification"),
    ],
)
def test_words_are_of_this_task_alone(task, message):
    with pytest.raises(MisuseError, match=message):
        get_task(task).check_columns(Columns(text=None, words="tokens"), Tokenization(8))


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        (Columns(text=None, messages="m"), {}, "reads --words-column"),
        (Columns(text_pair="b"), {}, "reads --words-column"),
        (Columns(), {"packing": True}, "--packing is for language models"),
        (Columns(), {"truncation_side": "left"}, "reads words, and keeps the first"),
    ],
)
def test_inputs_of_other_kinds(columns, settings, message):
    with pytest.raises(MisuseError, match=message):
        TASK.check_columns(columns, Tokenization(8, **settings))


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert", "gpt2", "llama"])
def test_logits_are_those_of_the_model_alone(kind, bert_tokenizer):
    config = AutoConfig.for_model(kind, vocab_size=len(bert_tokenizer), pad_token_id=0, num_labels=5, **TINY[kind])
    set_seed(0)
    model = AutoModelForTokenClassification.from_config(config).eval()
    rows = tokenize(bert_tokenizer, ("the", "catdog"), ("old", "market", "profit", "and", "goal"), ("sat",))
    names = set(bert_tokenizer.model_input_names) if kind == "bert" else {"input_ids", "attention_mask"}
    inputs, supervised = TASK.collate(rows, 0)
    with torch.no_grad():
        found = TASK.gather_logits(model, {k: v for k, v in inputs.items() if k in names}, supervised)
        alone = [
            model(input_ids=torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0][
                torch.from_numpy(row.supervised)
            ]
            for row in rows
        ]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-4)


def predictions(labels: list[int], predicted: list[int], rows: list[int], names: tuple[str, ...] | None) -> Predictions:
    count = len(labels)
    truth = np.array(labels)
    return Predictions(
        truth, np.array(predicted), np.full(count, 0.5), np.where(truth == NO_LABEL, np.nan, 0.7), np.array(predicted),
        np.array(rows), np.zeros(max(rows) + 1), np.zeros(max(rows) + 1, dtype=np.int64), names,
    )  # fmt: skip


def test_metrics_are_of_entities():
    names = ("O", "B-A", "I-A", "B-B")
    found = predictions([1, 2, 0, 3, 1], [1, 2, 3, 3, 2], [0, 0, 0, 1, 2], names)
    metrics = TASK.metrics(found, 4)
    assert metrics["precision"] == pytest.approx(3 / 4)  # A, B, B, and an entity that starts with I-A in the last row
    assert metrics["recall"] == pytest.approx(3 / 3)
    assert metrics["f1"] == pytest.approx(6 / 7)
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert metrics["loss"] == pytest.approx(0.7)
    sums, weights = TASK.row_scores(found)
    assert sums.sum() / weights.sum() == pytest.approx(metrics["f1"])


def test_an_entity_does_not_go_on_in_the_next_row():
    names = ("O", "B-A", "I-A")
    assert TASK.metrics(predictions([1, 2], [1, 2], [0, 1], names), 3)["recall"] == 1
    sums, weights = TASK.row_scores(predictions([1, 2], [1, 2], [0, 1], names))
    assert (sums.tolist(), weights.tolist()) == ([2, 2], [2, 2])


def test_parts_of_speech_are_words_one_by_one():
    metrics = TASK.metrics(predictions([0, 0, 1, NO_LABEL], [0, 1, 1, 1], [0, 0, 0, 0], ("NOUN", "VERB")), 2)
    assert metrics["f1"] == metrics["accuracy"] == pytest.approx(2 / 3)


def test_nothing_labelled_is_no_error():
    metrics = TASK.metrics(predictions([NO_LABEL], [0], [0], ("O", "B-A")), 2)
    assert all(np.isnan(value) for value in metrics.values())
