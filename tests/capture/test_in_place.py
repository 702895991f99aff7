"""Captures of Parquet files that are read in place.

Shards are planned from the footers, each row group is fetched once, and the rows equal those from
other file formats.
"""

from __future__ import annotations

import dataclasses
import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline as softlabel
from pipeline.cache import Layout, Plan, verify
from pipeline.cache.format.manifest import parse
from pipeline.capture import job
from pipeline.capture.plan import plan_shards
from pipeline.capture.run import run
from pipeline.errors import ContractError
from pipeline.records import SourceContents, SplitContents
from pipeline.sources import survey
from tests.conftest import tiny_model
from tests.support.captures import config, hashes  # noqa: F401 - a fixture
from tests.support.ranges import served  # noqa: F401 - a fixture


@pytest.fixture
def as_parquet(config, documents, tmp_path):
    """A folder of the documents as Parquet in row groups of 4, and a configuration factory."""
    folder = tmp_path / "parquet"
    folder.mkdir()
    for split, rows in documents.items():
        rows.to_parquet(folder / f"{split}.parquet", batch_size=4)

    def make(output="in-place", dataset=folder, **settings):
        made = config(output, **settings)
        return dataclasses.replace(made, data=dataclasses.replace(made.data, dataset=str(dataset)))

    return folder, make


@pytest.mark.parametrize(
    ("rows", "most", "starts", "expected"),
    [
        ((0, 10), 4, [], [0, 4, 8, 10]),
        ((0, 10), 4, [0, 3, 6], [0, 3, 6, 10]),
        ((0, 12), 7, [0, 3, 6, 9], [0, 6, 12]),
        ((0, 25), 10, [0, 25], [0, 10, 20, 25]),
        ((0, 40), 10, [0, 25], [0, 10, 20, 25, 35, 40]),
        ((5, 20), 10, [0, 8, 16], [5, 8, 16, 20]),
        ((0, 8), 4, [0, 0, 4], [0, 4, 8]),
        ((0, 0), 4, [0], [0]),
    ],
)
def test_shards_end_with_row_groups_where_they_can(rows, most, starts, expected):
    found = plan_shards({"train": rows}, most, row_groups={"train": starts})
    assert [rows[0], *(shard.stop for shard in found)] == expected
    assert [shard.start for shard in found] == expected[:-1]


def test_the_same_rows_as_of_another_format(config, as_parquet):
    _, make = as_parquet
    plain, found = run(config("plain")), run(make())
    assert found.manifest.contract.source.fingerprints.keys() == {"train", "test"}
    assert all(value.startswith("files-") for value in found.manifest.contract.source.fingerprints.values())
    assert "| train, SHA-256 of its list of files | `files-" in (found.root / "README.md").read_text()
    assert "| train, SHA-256 of its columns | `" in (plain.root / "README.md").read_text()
    assert [shard.stop for shard in parse(Plan, Layout(found.root).plan).shards if shard.split == "train"] == [
        *range(4, 41, 4)
    ]
    ours, theirs = ([row.example for row in cache.dataset("train")] for cache in (found, plain))
    assert [row.source_row for row in ours] == [row.source_row for row in theirs]
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.full
def test_workers_parts_and_resumes_make_the_same_bytes(as_parquet):
    _, make = as_parquet
    once = run(make("once"))
    assert hashes(run(make("workers", num_workers=2))) == hashes(once)
    assert run(make("parts", part="0/2")) is None
    assert hashes(run(make("parts", part="1/2"))) == hashes(once)
    assert run(make("once")).manifest == once.manifest
    assert verify(once.root).problems == ()


def test_a_part_of_the_rows_and_new_files_at_the_end(as_parquet):
    folder, make = as_parquet
    part = run(make("part", rows="10:30"))
    assert sorted({row.example.source_row for row in part.dataset("train")}) == list(range(10, 30))
    first = run(make())
    again = run(make(append=True))
    assert again.manifest == first.manifest
    (folder / "train").mkdir()
    (folder / "train.parquet").rename(folder / "train" / "0.parquet")
    shutil.copy(folder / "test.parquet", folder / "train" / "1.parquet")
    with pytest.raises(ContractError, match=r"fingerprints.*--append where the data set has only gained rows"):
        run(make())
    grown = run(make(append=True))
    assert {name: hashes(grown)[name] for name in hashes(first)} == hashes(first)
    assert sorted({row.example.source_row for row in grown.dataset("train")}) == list(range(52))
    shutil.copy(folder / "train" / "1.parquet", folder / "train" / "0.parquet")
    with pytest.raises(
        ContractError, match="--append: split train: expected the 52 rows that were cached to come first"
    ):
        run(make(append=True))


def test_a_cache_that_was_begun_before_goes_on_as_it_began(as_parquet, monkeypatch, tmp_path):
    """Earlier versions fingerprinted the rows of Parquet files and ignored row groups."""
    _, make = as_parquet
    with monkeypatch.context() as patch:
        patch.setattr(job, "survey", lambda source, ranges, by_contents: survey(source, ranges, by_contents=True))
        patch.setattr(job.Source, "row_groups", {})
        before = run(make())
    assert [len(value) for value in before.manifest.contract.source.fingerprints.values()] == [64, 64]
    Layout(before.root).manifest.unlink()
    Layout(before.root).shard("train-00002").unlink()
    assert run(make()).manifest.cache_id == before.manifest.cache_id
    assert run(make(append=True)).manifest.cache_id == before.manifest.cache_id
    anew = run(make(overwrite=True))
    assert anew.manifest.contract.source.fingerprints["train"].startswith("files-")


@pytest.mark.full
def test_each_row_group_is_fetched_once_by_two_workers(as_parquet, served):
    folder, make = as_parquet
    shutil.copy(folder / "train.parquet", served.folder)
    cache = run(make("remote", dataset=f"{served.url}/train.parquet", num_workers=2))
    assert {row.example.source_row for row in cache.dataset("train")} == set(range(40))
    metadata = pq.ParquetFile(folder / "train.parquet").metadata
    groups = [metadata.row_group(i).column(0) for i in range(metadata.num_row_groups)]
    begins = {min(g.data_page_offset, g.dictionary_page_offset or g.data_page_offset): i for i, g in enumerate(groups)}
    times = [0] * len(groups)
    for (_, start, _), count in served.fetched.items():
        if start in begins:
            times[begins[start]] += count
    # The first row group is also read before the workers begin: to show its first row and for the
    # comparison of the head.
    assert times[1:] == [1] * (len(groups) - 1)
    assert times[0] <= 3


def test_the_counts_at_the_end_are_those_of_other_formats(tmp_path, bert_tokenizer, caplog):
    texts = ["the cat", "  ", "the dog", "the bird", "the cat"]
    table = pa.table({"text": texts, "label": pa.array([0, None, 1, 0, None], pa.int64())})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=2)
    pq.write_table(table.slice(3), tmp_path / "test.parquet")
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")}
    found = softlabel.cache_logits(
        dataset=datasets.load_dataset("parquet", data_files=files, streaming=True),
        output=tmp_path / "cache",
        teacher=tiny_model("bert", len(bert_tokenizer), num_labels=2, spread=4.0),
        task="sequence-classification",
        tokenizer=bert_tokenizer,
    )
    contents = parse(SourceContents, found.root / "reports" / "contents.json")
    assert contents.splits == {"train": SplitContents(5, 2, 1), "test": SplitContents(2, 1, 0)}
    assert contents.shared == {"train, test": 2}
    assert "equal contents in both splits train and test: 2" in caplog.text
    assert "rows without a label: 2 of 5 in train, 1 of 2 in test" in caplog.text


def test_of_packed_rows_equal_contents_are_not_looked_for_and_that_is_said(as_parquet, caplog):
    _, make = as_parquet
    made = make()
    run(dataclasses.replace(made, data=dataclasses.replace(made.data, packing=True)))
    assert "it was not checked whether two splits share rows" in caplog.text
