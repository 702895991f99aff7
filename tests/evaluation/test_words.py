"""The evaluation table and report of token classifiers count entities and words, not tokens."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForTokenClassification, set_seed

import pipeline as softlabel
from pipeline.cache import Cache
from pipeline.cache.views.tokens import marked_tokens
from pipeline.config import ReportConfig
from pipeline.evaluation import format_table
from pipeline.evaluation.report.report import report
from pipeline.records import Columns
from tests.conftest import TINY
from tests.support.entities import TAGS, sentences
from tests.support.once import once
from tests.support.profile import plain_pictures  # noqa: F401 - a fixture


def tagger(tokenizer, save, seed: int, name: str):
    set_seed(seed)
    config = AutoConfig.for_model(
        "bert", vocab_size=len(tokenizer), pad_token_id=0, num_labels=len(TAGS), **TINY["bert"]
    )
    found = AutoModelForTokenClassification.from_config(config).eval()
    with torch.no_grad():
        found.classifier.weight.mul_(40)
    found.config.id2label, found.config.label2id = dict(enumerate(TAGS)), {name: i for i, name in enumerate(TAGS)}
    return save(found, tokenizer, name)


@pytest.fixture
def setting(tmp_path, bert_tokenizer, save_teacher):
    """The cache of a random teacher, and the path of a random student."""
    teacher = tagger(bert_tokenizer, save_teacher, 0, "teacher")
    student = tagger(bert_tokenizer, save_teacher, 5, "student")

    def make(folder):
        softlabel.cache_logits(
            str(teacher), sentences(), folder / "cache", task="token-classification",
            columns=Columns(text=None, words="tokens", label="ner_tags"),
        )  # fmt: skip

    once(__name__, make, tmp_path)
    return Cache.open(tmp_path / "cache"), str(student)


def test_the_first_row_is_logged_with_its_labelled_tokens(setting, tmp_path, caplog):
    cache, student = setting
    caplog.set_level(logging.INFO)
    softlabel.cache_logits(
        student, sentences(), tmp_path / "logged", task="token-classification",
        columns=Columns(text=None, words="tokens", label="ner_tags"),
    )  # fmt: skip
    (line,) = (each.getMessage() for each in caplog.records if "first row of" in each.getMessage())
    start = "first row of train (labelled tokens in brackets): "
    assert line.startswith(start)
    row = next(iter(cache.dataset("train"))).example
    assert line == start + marked_tokens(cache.tokenizer, row.input_ids.tolist(), row.supervised, follows=False)


def test_the_table_says_what_entities_and_words_are(setting):
    cache, student = setting
    found = softlabel.evaluate(cache, {"s": student})
    text = format_table(found)
    assert text.startswith(f"token-classification, split test: 40 rows, {found.positions} words")
    assert "f1: of entities, right where label and both ends are" in text
    assert "precision: share of the predicted entities that are right" in text
    assert "recall: share of the true entities that are found" in text
    assert "accuracy: share of words with the right class" in text
    assert "agreement: share of words where" in text
    assert "tokens" not in text
    other = format_table(dataclasses.replace(found, task="sequence-classification"))
    assert f"40 rows, {found.positions} positions" in other
    assert "accuracy: share of right answers (language models: of next tokens)" in other


def test_the_report_shows_the_word_at_stake(setting, tmp_path, plain_pictures):
    cache, student = setting
    found = report(
        ReportConfig(cache=str(cache.root), student=(f"s={student}",), output=str(tmp_path / "r"), rounds=0,
                     resamples=100, examples=3)
    )  # fmt: skip
    names = cache.manifest.contract.label_names
    rows = {row.example.source_row: row.example for row in cache.dataset("test")}
    assert len(found.examples) == 3
    for item in found.examples:
        words = rows[item.source_row].words
        assert sum(word.startswith("[") for word in item.text.split()) == 1
        assert item.text.replace("[", "").replace("]", "") == " ".join(words)
        at = next(i for i, word in enumerate(item.text.split()) if word.startswith("["))
        assert item.truth == names[rows[item.source_row].labels[at]]
    assert {item.name for item in found.slices} <= set(TAGS)
    assert found.slice_kind == "class"
    page = (tmp_path / "r" / "report.md").read_text(encoding="utf-8")
    assert f"40 rows, {found.positions} words of the split test" in page
    assert f"40 rows, {found.positions} words. About s" in page
    assert "points of f1 and accuracy, nats of loss" in page
    assert "| class | words |" in page
    assert "nats a word" in page
    tests = {item.metric: item.test for item in found.comparisons}
    assert tests["f1"] == "none"
    assert "so that no sum over rows can be tested" in page
    assert tests["accuracy"] == "sign flips over rows"
    assert np.isfinite(found.quality[0].metrics["f1"].value)
