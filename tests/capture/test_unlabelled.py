"""`--unlabelled`: rows without labels that are appended to the labelled ones.

Tests what is read, what the contract records, and what is refused.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest

import pipeline as softlabel
from pipeline.capture import run as stage
from pipeline.config import CacheLogitsConfig, DataConfig
from pipeline.errors import ContractError, SourceError
from pipeline.sources import load_source
from pipeline.sources.unlabelled import load_unlabelled
from tests.conftest import tiny_model

WORDS = ("cat", "dog", "bird")


@pytest.fixture
def folder(tmp_path, bert_tokenizer, monkeypatch) -> Path:
    """A teacher, 6 labelled rows, and 4 and 3 unlabelled rows as CSV and Parquet."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3, spread=4.0)
    model.config.id2label = dict(enumerate(WORDS))
    model.config.label2id = {word: i for i, word in enumerate(WORDS)}
    model.save_pretrained("teacher")
    bert_tokenizer.save_pretrained("teacher")
    rows = [f"the {WORDS[i % 3]} sat on hill {i}" for i in range(6)]
    Path("train.csv").write_text("text,label\n" + "".join(f"{t},{WORDS[i % 3]}\n" for i, t in enumerate(rows)))
    Path("more.csv").write_text("text,label\n" + "".join(f"a dark river {i},nonsense\n" for i in range(4)))
    datasets.Dataset.from_dict({"text": [f"old stone {i}" for i in range(3)]}).to_parquet("rest.parquet")
    datasets.Dataset.from_dict({"text": rows, "label": [i % 3 for i in range(6)]}).to_parquet("train.parquet")
    return tmp_path


def capture(output: str = "cache", dataset: str = "train.csv", **settings):
    return stage.run(
        CacheLogitsConfig(
            task="sequence-classification",
            data=DataConfig(dataset=dataset, max_length=16),
            teacher="teacher",
            output=output,
            **{"rows_per_shard": 5, **settings},
        )
    )


@pytest.mark.parametrize("dataset", ["train.csv", "train.parquet"])
def test_rows_come_behind_the_labelled_ones_without_labels(folder, caplog, dataset):
    caplog.set_level(logging.INFO)
    cache = capture(dataset=dataset, unlabelled=("more.csv", "rest.parquet"))
    rows = list(cache.dataset("train"))
    assert [row.example.label for row in rows] == [0, 1, 2, 0, 1, 2, *[None] * 7]
    assert [row.example.source_row for row in rows] == list(range(13))
    assert [row.example.text for row in rows[6:]] == [f"a dark river {i}" for i in range(4)] + [
        f"old stone {i}" for i in range(3)
    ]
    source = json.loads((cache.root / "manifest.json").read_text())["contract"]["source"]
    assert source["unlabelled_sources"] == [
        {"name": "more.csv", "revision": None, "rows": 4},
        {"name": "rest.parquet", "revision": None, "rows": 3},
    ]
    assert "6 rows, and 7 without labels of more.csv, rest.parquet" in caplog.text
    assert "its column 'label' is not read" in caplog.text
    card = (cache.root / "README.md").read_text()
    assert "--unlabelled more.csv" in card
    assert "4 rows of train" in card


def test_the_same_rows_have_the_same_soft_labels_as_in_one_file(folder):
    """The shards equal those of a capture from a single file with all rows."""
    lines = Path("train.csv").read_text() + "".join(f"a dark river {i},\n" for i in range(4))
    Path("whole.csv").write_text(lines)
    added, whole = capture(unlabelled=("more.csv",)), capture("other", "whole.csv")
    assert [shard.sha256 for shard in added.manifest.shards] == [shard.sha256 for shard in whole.manifest.shards]
    # Equal contents have equal fingerprints; the contract lists the unlabelled files separately.
    assert added.manifest.contract.source.fingerprints == whole.manifest.contract.source.fingerprints
    assert "unlabelled_sources" not in (whole.root / "manifest.json").read_text()


def test_the_same_command_goes_on_and_other_rows_are_refused(folder):
    before = capture(unlabelled=("more.csv",))
    assert capture(unlabelled=("more.csv",)).manifest == before.manifest
    Path("more.csv").write_text(Path("more.csv").read_text().replace("river 3", "river 9"))
    with pytest.raises(ContractError, match=r"source\.fingerprints\.train: expected"):
        capture(unlabelled=("more.csv",))
    with pytest.raises(ContractError, match=r"source\.fingerprints\.train: expected"):
        capture()


def test_a_file_without_the_label_column_is_no_warning(folder, caplog):
    Path("bare.csv").write_text("text\na dark river\n")
    data = DataConfig(dataset="bare.csv", label_column="kind")
    load_unlabelled(("bare.csv",), data)
    assert "label column" not in caplog.text
    load_source(data)
    assert "bare.csv: no split has the label column 'kind'; found text" in caplog.text


@pytest.mark.parametrize("dataset", ["train.csv", "train.parquet"])
def test_unlabelled_rows_are_appended_to_a_finished_cache(folder, dataset):
    first = capture(dataset=dataset)
    grown = capture(dataset=dataset, unlabelled=("more.csv",), append=True)
    more = capture(dataset=dataset, unlabelled=("more.csv", "rest.parquet"), append=True)
    assert [len(cache.dataset("train")) for cache in (first, grown, more)] == [6, 10, 13]
    assert [shard.sha256 for shard in more.manifest.shards][:2] == [shard.sha256 for shard in first.manifest.shards]
    assert capture(dataset=dataset, unlabelled=("more.csv", "rest.parquet"), append=True).manifest == more.manifest
    with pytest.raises(ContractError, match="come first, unchanged"):
        capture(dataset=dataset, unlabelled=("rest.parquet", "more.csv"), append=True)


def test_a_range_of_rows_counts_over_both(folder):
    cache = capture(unlabelled=("more.csv", "rest.parquet"), rows="4:11")
    assert [row.example.source_row for row in cache.dataset("train")] == list(range(4, 11))
    assert [row.example.label for row in cache.dataset("train")] == [1, 2, *[None] * 5]


def test_from_python(folder, bert_tokenizer):
    labelled = datasets.Dataset.from_csv("train.csv")
    more = datasets.Dataset.from_dict({"text": ["a bird", "the cat"]})
    cache = softlabel.cache_logits(
        "teacher", labelled, "cache", task="sequence-classification", unlabelled=[more, "rest.parquet"]
    )
    labels = cache.dataset("train").column("label")
    assert len(labels) == 11
    assert np.isnan(labels[6:].astype(np.float64)).all()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("body\nx\n", "no column 'text'; found body; rename a column"),
        ("text\n1\n2\n", "expected text, found integers"),
        ("", "no rows"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(folder, content, named):
    Path("bad.csv").write_text(content)
    with pytest.raises(SourceError, match=named) as caught:
        capture(unlabelled=("bad.csv",))
    assert "bad.csv" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("cache").exists()


def test_there_is_a_split_to_add_to(folder):
    Path("data").mkdir()
    Path("train.csv").rename("data/test.csv")
    with pytest.raises(SourceError, match="adds rows to the split train, found test"):
        capture(dataset="data", unlabelled=("more.csv",))
    Path("splits").mkdir()
    for name in ("validation", "test"):
        Path(f"splits/{name}.csv").write_text("text\na cat\n")
    Path("data/test.csv").rename("train.csv")
    with pytest.raises(SourceError, match="expected a split train, or one split, found validation, test"):
        capture(unlabelled=("splits",))


def test_rows_are_as_long_as_the_teacher_was_trained_on(folder, caplog):
    """The default length is the one the teacher was trained with; a flag or older cache wins."""

    def length(output: str, **data) -> int:
        settings = CacheLogitsConfig(
            task="sequence-classification",
            data=DataConfig(dataset="train.csv", **data),
            teacher="teacher",
            output=output,
        )
        cache = stage.run(settings)
        return cache.manifest.contract.tokenization.max_length

    caplog.set_level(logging.INFO)
    assert length("before") == 64
    Path("teacher/metrics.json").write_text(json.dumps({"max_length": 12}))
    assert length("before") == 64  # the same cache as before
    assert length("after") == 12
    assert "at most 12 tokens, as teacher was trained on" in caplog.text
    assert length("after") == 12
    assert length("asked", max_length=20) == 20
