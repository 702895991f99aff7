"""The dataset card of a cache, as the hub, `datasets` and DuckDB read it."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys

import duckdb
import numpy as np
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

from pipeline.cache.format.manifest import make_manifest, parse
from pipeline.cache.views.card import card_license, make_card
from pipeline.cache.views.mass import KeptMasses, draw, kept_masses
from pipeline.cache.views.provenance import command
from pipeline.cache.views.recipes import kept_mass_sql
from pipeline.cache.views.reports import write_reports
from pipeline.cli import main
from pipeline.records import Ancestor, Columns, Full, Sampled, TopK, TopP
from pipeline.softlabels import target
from tests.support.rows import build_cache

ENCODINGS = [Full(), TopK(4), TopP(0.7), Sampled(6.0)]


@pytest.fixture
def cache(tmp_path, lm_tokenizer):
    return build_cache(tmp_path / "cache", lm_tokenizer, splits=("train", "test"))


def test_the_front_matter_says_what_the_hub_searches(tmp_path, cache):
    write_reports(cache, tmp_path / "out", license="cc-by-4.0", location="hf://datasets/org/name")
    card = DatasetCard((tmp_path / "out" / "README.md").read_text())
    data = card.data.to_dict()
    assert data["license"] == "cc-by-4.0"
    assert data["task_categories"] == ["text-generation"]
    assert data["size_categories"] == ["n<1K"]
    assert {"soft-labels", "knowledge-distillation", "causal-lm"} <= set(data["tags"])
    assert "base_model" not in data  # a local path is not a hub model
    assert [part["split"] for part in data["configs"][0]["data_files"]] == ["train", "test"]
    assert (
        cache.manifest.cache_id in data["configs"][0]["description"]
    )  # so that `datasets` does not reuse another cache's copy
    assert [split["num_examples"] for split in data["dataset_info"]["splits"]] == [60, 60]
    assert data["dataset_info"]["download_size"] == sum(shard.bytes for shard in cache.manifest.shards)
    assert 'load_dataset("org/name", split="train")' in card.text
    assert "--cache hf://datasets/org/name" in card.text


def test_a_teacher_and_a_source_of_the_hub_are_linked(cache):
    contract = cache.manifest.contract
    contract = dataclasses.replace(
        contract,
        teacher=dataclasses.replace(contract.teacher, name="org/teacher", revision="a" * 40),
        source=dataclasses.replace(contract.source, name="org/texts", revision="b" * 40),
    )
    text = make_card(make_manifest(contract, cache.manifest.shards, bad_rows=3, probe=None))
    data = DatasetCard(text).data.to_dict()
    assert (data["base_model"], data["source_datasets"]) == ("org/teacher", ["org/texts"])
    for expected in ("a" * 40, "b" * 40, contract.tokenizer.sha256, "3 rows were set aside", "None is stated"):
        assert expected in text


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.kind)
@pytest.mark.parametrize("tokens", [True, False])
def test_datasets_loads_every_split_with_no_code_of_ours(tmp_path, lm_tokenizer, encoding, tokens):
    cache = build_cache(
        tmp_path / "cache", lm_tokenizer, encoding=encoding, tokens=tokens, per_shard=5, splits=("train", "test")
    )
    loaded = load_dataset(str(cache.root), cache_dir=str(tmp_path / "hf"))
    assert {name: len(rows) for name, rows in loaded.items()} == {"train": 10, "test": 10}
    assert list(loaded["train"].features) == list(cache.manifest.contract.columns)
    assert loaded["test"]["source_row"] == list(range(10))


@pytest.mark.parametrize("encoding", ENCODINGS[1:], ids=lambda e: e.kind)
def test_duckdbs_kept_mass_by_split_is_ours(tmp_path, lm_tokenizer, monkeypatch, encoding):
    """The SQL query of the card returns the stored kept mass, which equals that of decoded rows."""
    cache = build_cache(tmp_path / "cache", lm_tokenizer, encoding=encoding, per_shard=20, splits=("train", "test"))
    write_reports(cache, tmp_path / "out")
    query = re.search(r"```sql\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(cache.root)
    found = dict(duckdb.sql(query).fetchall())
    ours = parse(KeptMasses, tmp_path / "out" / "reports" / "kept-mass.json").splits
    assert set(found) == {"train", "test"}
    for split, mass in ours.items():
        assert found[split] == pytest.approx(mass.mean, rel=1e-9)
        assert f"| {split} | {mass.positions:,} | {found[split]:.4f} |" in (tmp_path / "out" / "README.md").read_text()
        rows = [row.soft for row in cache.dataset(split)]
        assert mass.positions == sum(map(len, rows)) == sum(mass.histogram)
        decoded = np.concatenate([_certain(row) for row in rows])
        assert mass.mean == pytest.approx(float(decoded.mean()), rel=1e-3)


def _certain(soft):
    """(N,) the probability mass of the top classes, from the decoded target."""
    goal = target(soft, 1.0)
    is_top = np.concatenate(
        [
            np.r_[np.ones(int(top), dtype=bool), np.zeros(int(tail), dtype=bool)]
            for top, tail in zip(soft.top_offsets.diff(), soft.tail_offsets.diff(), strict=True)
        ]
    )
    return np.add.reduceat(np.where(is_top, goal.weights.numpy(), 0), goal.offsets[:-1].numpy())


def test_duckdb_finds_the_split_of_shards_with_other_names(cache, monkeypatch):
    shards = tuple(dataclasses.replace(shard, split="dev") for shard in cache.manifest.split_shards("test"))
    manifest = make_manifest(
        cache.manifest.contract, (*cache.manifest.split_shards("train"), *shards), bad_rows=0, probe=None
    )
    monkeypatch.chdir(cache.root)
    found = dict(duckdb.sql(kept_mass_sql(manifest)).fetchall())
    assert found == {
        "train": pytest.approx(kept_masses(cache).splits["train"].mean),
        "dev": pytest.approx(kept_masses(cache).splits["test"].mean),
    }


def test_everything_is_kept_of_full(tmp_path, lm_tokenizer):
    cache = build_cache(tmp_path / "cache", lm_tokenizer, encoding=Full(), tokens=False, per_shard=5)
    assert kept_masses(cache) is None
    write_reports(cache, tmp_path / "out")
    assert not (tmp_path / "out" / "reports").exists()
    assert "kept-mass" not in (tmp_path / "out" / "README.md").read_text()


def test_the_same_cache_gives_the_same_bytes(tmp_path, cache):
    for name in ("a", "b"):
        write_reports(cache, tmp_path / name, license="mit")
    for part in ("README.md", "reports/kept-mass.json", "reports/kept-mass.png"):
        assert (tmp_path / "a" / part).read_bytes() == (tmp_path / "b" / part).read_bytes()
    assert (tmp_path / "a" / "reports/kept-mass.png").stat().st_size < 60_000
    assert "![kept mass](reports/kept-mass.png)" in (tmp_path / "a" / "README.md").read_text()


def test_without_matplotlib_there_is_no_picture(tmp_path, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw(kept_masses(cache), tmp_path / "plot.png")
    write_reports(cache, tmp_path / "out")
    assert not (tmp_path / "out" / "reports" / "kept-mass.png").exists()
    assert ".png" not in (tmp_path / "out" / "README.md").read_text()


def test_the_licence_can_be_read_back(cache):
    assert card_license(make_card(cache.manifest, license="cc-by-4.0")) == "cc-by-4.0"
    assert card_license(make_card(cache.manifest)) is None


def test_ancestors_are_told(cache):
    manifest = dataclasses.replace(cache.manifest, ancestry=(Ancestor("c" * 64, "filter --where 'x > 1'"),))
    assert f"1. `filter --where 'x > 1'` of `{'c' * 64}`" in make_card(manifest)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.kind)
def test_the_command_is_one_that_the_command_line_takes(tmp_path, lm_tokenizer, encoding):
    contract = build_cache(tmp_path / "cache", lm_tokenizer, encoding=encoding, per_shard=3).manifest.contract
    contract = dataclasses.replace(
        contract,
        source=dataclasses.replace(
            contract.source, columns=Columns(text="a column", keep=("id", "domain")), holdout=0.1, revision="b" * 40
        ),
        on_bad_row="skip",
    )
    words = shlex.split(command(contract))
    assert words[:2] == ["softlabel", "cache-logits"]
    given = main.commands["cache-logits"].make_context("cache-logits", words[2:]).params
    assert given["encoding"] == encoding.kind
    assert given["text_column"] == "a column"
    assert given["keep_column"] == ("id", "domain")
    assert (given["holdout"], given["on_bad_row"], given["dataset_revision"]) == (0.1, "skip", "b" * 40)
    assert given["temperature"] == getattr(encoding, "temperatures", (1.0,) if encoding.kind == "sampled" else ())


@pytest.mark.parametrize(
    ("rows", "name"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (10**12, "n>1T"), (10**11, "100B<n<1T")],
)
def test_sizes_as_the_hub_names_them(cache, rows, name):
    shard = dataclasses.replace(cache.manifest.shards[0], rows=rows)
    text = make_card(make_manifest(cache.manifest.contract, (shard,), bad_rows=0, probe=None))
    assert DatasetCard(text).data.to_dict()["size_categories"] == [name]
