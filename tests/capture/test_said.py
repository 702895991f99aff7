"""Log messages of a capture before its first shard and at its end."""

from __future__ import annotations

import logging

import pytest
from datasets import Dataset, DatasetDict

import pipeline as softlabel
from tests.conftest import tiny_model


@pytest.fixture
def settings(bert_tokenizer):
    model = tiny_model("bert", len(bert_tokenizer), num_labels=2, spread=4.0)
    return {"teacher": model, "task": "sequence-classification", "tokenizer": bert_tokenizer}


def lines_of(caplog, tmp_path, rows, settings, **more) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "pipeline"):
        softlabel.cache_logits(dataset=rows, output=tmp_path / "c", **settings, **more)
    return [record.getMessage() for record in caplog.records]


def test_the_first_row_is_shown_as_tokens(tmp_path, settings, caplog):
    said = lines_of(caplog, tmp_path, Dataset.from_dict({"text": ["the cat sat", "a dog"]}), settings)
    assert any("first row of train" in line and "[CLS] the cat sat [SEP]" in line for line in said)


def test_what_was_cut_repeated_blank_or_unlabelled_is_said_and_stands_in_the_card(tmp_path, settings, caplog):
    train = {"text": ["the cat", "the dog " * 20, " ", "old bird"], "label": [0, 1, None, None]}
    test = {"text": ["the cat", "a tree"], "label": [1, 0]}
    rows = DatasetDict(train=Dataset.from_dict(train), test=Dataset.from_dict(test))
    said = lines_of(caplog, tmp_path, rows, settings, max_length=12)
    card = (tmp_path / "c" / "README.md").read_text()
    for line in (
        "1 of 6 rows were cut at the maximum length and lost 30 tokens",
        "equal contents in both splits train and test: 1",
        "1 of 6 rows have a text of white space only",
        "rows without a label: 2 of 4 in train",
    ):
        assert any(line in each for each in said), line
        assert line[1:] in card, line
    kept = (tmp_path / "c" / "reports" / "contents.json").read_bytes()
    assert b'"cut_tokens": 30' in kept
    lines_of(caplog, tmp_path, rows, settings, max_length=12)  # already finished: nothing changes
    assert (tmp_path / "c" / "reports" / "contents.json").read_bytes() == kept


def test_nothing_is_said_where_there_is_nothing(tmp_path, settings, caplog):
    rows = DatasetDict(train=Dataset.from_dict({"text": ["a cat"]}), test=Dataset.from_dict({"text": ["a dog"]}))
    said = lines_of(caplog, tmp_path, rows, settings)
    assert [line for line in said if "first row" not in line] == []
    assert "None: every row" in (tmp_path / "c" / "README.md").read_text()


def test_more_shards_than_a_folder_of_the_hub_takes(tmp_path, settings, caplog, monkeypatch):
    monkeypatch.setattr("pipeline.capture.job.MOST_FILES", 2)
    rows = Dataset.from_dict({"text": ["a cat", "a dog", "a tree"]})
    said = lines_of(caplog, tmp_path, rows, settings, rows_per_shard=1)
    line = "3 shards of 1 rows; the Hub takes 2 files in a folder: --rows-per-shard 2 makes as many"
    assert sum(each.endswith(line) for each in said) == 1
    assert not any("in a folder" in each for each in lines_of(caplog, tmp_path, rows, settings, rows_per_shard=1))
