"""Views of a cache of word labels.

They show words with their class names, never tokens, and never the tokens that follow.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex

import numpy as np
import pytest

import pipeline as softlabel
from pipeline.cache.views.card import make_card
from pipeline.cache.views.inspection import describe, labelled
from pipeline.cache.views.measures import measure
from pipeline.cache.views.page import write_page
from pipeline.cache.views.provenance import command
from pipeline.cache.views.samples import sample_of
from pipeline.cache.views.tokens import in_context, marked_tokens, words_of
from pipeline.cli import main
from pipeline.cli.echo import echo_cache
from pipeline.records import NO_LABEL, Columns, Example, Full, Tokenization, TopK
from pipeline.tasks import get_task

NAMES = ("O", "B-PET", "I-PET")
#: Words, their labels, and the teacher's most likely class with its margin in logits.
ROWS = (
    (("the", "catdog", "sat"), (0, 1, NO_LABEL), ((0, 5.0), (0, 9.0), (0, 3.0))),
    (("cat", "ran"), (1, 0), ((1, 4.0), (2, 2.0))),
    (("home",), (NO_LABEL,), ((0, 1.0),)),
)


def build(root, tokenizer, *, encoding=None, **settings):
    given = [Example(i, words=words, word_labels=labels) for i, (words, labels, _) in enumerate(ROWS)]
    tokenized = get_task("token-classification").tokenize(given, "train", tokenizer, Tokenization(64))
    rows = [
        softlabel.LabelledRow(
            row.input_ids,
            logits=np.array([[height * (i == best) for i in range(3)] for best, height in said]),
            supervised=row.supervised,
            labels=row.labels,
            words=row.words,
        )
        for row, (_, _, said) in zip(tokenized, ROWS, strict=True)
    ]
    return softlabel.write_cache(
        rows, root, task="token-classification", tokenizer=tokenizer, encoding=encoding or Full(), teacher="t",
        label_names=NAMES, **settings,
    )  # fmt: skip


@pytest.fixture
def cache(tmp_path, bert_tokenizer):
    return build(tmp_path / "cache", bert_tokenizer)


def test_positions_of_words_mark_their_own_tokens(cache):
    row = next(iter(cache.dataset("train"))).example
    shown = marked_tokens(cache.tokenizer, row.input_ids.tolist(), row.supervised, follows=False)
    marked = re.findall(r"(?<!\S)\[(?!CLS|SEP)(\S+)\]", shown)
    ids = row.input_ids[row.supervised].tolist()
    assert marked == cache.tokenizer.convert_ids_to_tokens(ids)
    assert shown.startswith(f"{cache.tokenizer.cls_token} [")


@pytest.mark.parametrize("encoding", [Full(), TopK(2)], ids=lambda e: e.kind)
def test_the_terminal_shows_words_and_names(tmp_path, bert_tokenizer, encoding):
    cache = build(tmp_path / "cache", bert_tokenizer, encoding=encoding)
    lines = list(describe(cache, split=None, rows=2, tokens=2, top=2))
    assert "train: teacher agrees with the labels on 50.0% of 4 labelled words" in lines
    header = next(i for i, line in enumerate(lines) if "position" in line and "word" in line)
    assert ("kept" in lines[header]) == (encoding.kind == "top-k")
    position, word, label, *rest = lines[header + 1].split()
    assert (position, word, label) == ("1", "the", "O")
    assert rest[-4] == "O"
    assert lines[header + 2].split()[1:3] == ["catdog", "B-PET"]
    assert "O 100.0%" in lines[header + 2]
    assert lines[header + 3].strip() == "... 1 more words"
    assert not any("next token" in line for line in lines)


def test_labelled_words_are_counted(cache, capsys):
    assert labelled(cache) == {"train": 4}
    echo_cache(cache, "c")
    assert "3 rows, 4 labelled words, 6 positions" in capsys.readouterr().out


def test_a_sample_has_a_word_for_each_position(cache):
    first, _, last = (sample_of(cache, row, tokens=2, top=2) for row in cache.dataset("train"))
    assert [(word.text, word.label) for word in first.words] == [("the", "O"), ("catdog", "B-PET")]
    assert (first.cut, first.tokens, first.text) == (1, (), "")
    assert "3 words, 2 of them labelled" in first.facts
    the, pet = first.words
    assert the.candidates[0].name == "O"
    assert the.candidates[0].is_next
    assert pet.candidates[0].name == "O"
    assert not pet.candidates[0].is_next
    assert pet.weight == pytest.approx(1 / (2 + np.exp(9)), rel=1e-3)
    assert last.words[0].label is None
    assert last.words[0].weight is None
    assert not any(each.is_next for each in last.words[0].candidates)
    assert "loss" not in last.facts


def test_the_most_confident_disagreements_are_words_in_their_context(cache):
    found = measure(cache, "train").disagreements
    assert [(each.source_row, NAMES[each.label], NAMES[each.predicted]) for each in found] == [
        (0, "B-PET", "O"),
        (1, "O", "I-PET"),
    ]
    assert [each.text for each in found] == ["the [catdog] sat", "cat [ran]"]


def test_the_page_is_of_words(cache, tmp_path):
    write_page(cache, tmp_path / "page.html", rows=3)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for text in (
        '<th scope="col" role="columnheader">labelled words</th>',
        "All 3 rows, 6 words.",
        "on 50.0% of 4 labelled words (2)",
        "2 words have no label.",
        "Words by their label",
        "Labelled words by label (down)",
        "The labelled words to look at first",
        "the [catdog] sat",
        "<b>catdog</b>, label <bdi>B-PET</bdi>",
        "<b>home</b>, no label",
        "The teacher&#39;s entropy, by word",
    ):
        assert text in page, text
    for text in ("labelled rows", "next token", "The token here is"):
        assert text not in page, text


def test_words_that_were_not_stored_are_decoded_from_their_tokens(tmp_path, bert_tokenizer):
    cache = build(tmp_path / "cache", bert_tokenizer, store_text=False)
    assert "position_words" not in cache.manifest.contract.columns
    row = next(iter(cache.dataset("train"))).example
    starts = [*np.flatnonzero(row.supervised).tolist(), len(row.input_ids) - 1]
    expected = [bert_tokenizer.decode(row.input_ids[a:b].tolist()) for a, b in itertools.pairwise(starts)]
    assert list(words_of(bert_tokenizer, row)) == expected


def test_a_long_context_is_cut_on_both_sides():
    words = [str(i) for i in range(100)]
    shown = in_context(words, 50).split()
    assert shown[:2] == ["...", "35"]
    assert shown[-2:] == ["65", "..."]
    assert "[50]" in shown
    assert in_context(words[:3], 0) == "[0] 1 2"


def test_the_card_says_what_labels_and_words_are(cache, tmp_path, bert_tokenizer):
    text = make_card(cache.manifest)
    assert "the first token of each word" in text
    assert "of the token after it" not in text
    assert "`position_labels[n]`" in text
    assert "`position_words[n]`" in text
    assert "`position_words[n]`" not in make_card(build(tmp_path / "bare", bert_tokenizer, store_text=False).manifest)


@pytest.mark.parametrize("stored", [True, False])
def test_the_command_has_the_flags_of_words(tmp_path, bert_tokenizer, stored):
    contract = build(tmp_path / "cache", bert_tokenizer, store_text=stored).manifest.contract
    source = dataclasses.replace(contract.source, columns=Columns(text=None, words="tokens", label="ner_tags"))
    words = shlex.split(command(dataclasses.replace(contract, source=source, batch_tokens=10)))
    given = main.commands["cache-logits"].make_context("cache-logits", words[2:]).params
    assert (given["words_column"], given["label_column"]) == ("tokens", "ner_tags")
    assert given["store_text"] is (None if stored else False)
