"""A cache on disk: reading, verification, refusal of damaged files, reading with other tools."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from datasets import load_dataset

from pipeline.cache import Cache, verify
from pipeline.cache.format.manifest import Layout
from pipeline.cache.storage.commit import create_exclusively, sweep, temporary_path, write_atomically
from pipeline.cache.writing.build import begin
from pipeline.cli import main
from pipeline.errors import CacheError, ContractError, IntegrityError
from pipeline.records import Full, Sampled, ShardPlan, TopK, TopP
from pipeline.softlabels import target
from tests.support.rows import block_from, build_cache, make_plan, token_row


@pytest.fixture
def cache(tmp_path, lm_tokenizer):
    return build_cache(tmp_path / "cache", lm_tokenizer)


def test_rows_come_back_in_order(cache):
    rows = cache.dataset("train")
    assert len(rows) == 60
    assert [row.example.source_row for row in rows] == list(range(60))
    assert rows[59].example.kept == {"id": "row-59"}
    with pytest.raises(IndexError):
        rows[60]
    assert pickle.loads(pickle.dumps(rows))[31].example.source_row == 31


def test_memory_is_bounded_by_the_window(cache):
    rows = cache.dataset("train")
    rows.window = 1
    _ = rows[0], rows[59]
    assert len(rows._open) == 1


def test_no_such_split(cache):
    with pytest.raises(CacheError, match="no split 'dev'; the cache has train"):
        cache.dataset("dev")


@pytest.mark.parametrize("encoding", [Full(), TopK(4), Sampled(6.0)], ids=lambda e: e.kind)
@pytest.mark.parametrize("tokens", [True, False])
def test_datasets_reads_the_directory_as_it_is(tmp_path, lm_tokenizer, encoding, tokens):
    cache = build_cache(tmp_path / "cache", lm_tokenizer, encoding=encoding, tokens=tokens)
    rows = load_dataset(str(cache.root), split="train", cache_dir=str(tmp_path / "hf"))
    assert rows["source_row"] == list(range(60))
    for i in (0, 17, 59):
        ours, theirs = cache.dataset("train")[i].soft, cache.soft_labels(rows[i])
        assert torch.equal(ours.top_ids, theirs.top_ids)
        assert torch.equal(ours.tail_ids, theirs.tail_ids)
        torch.testing.assert_close(ours.top_logprobs, theirs.top_logprobs)


def test_duckdb_decodes_a_sampled_cache_with_the_cards_rule(cache):
    """SQL alone computes the sum of all weights of a cache.

    Top weights are integer multiples of 1/20; each tail class weighs 1/6.
    """
    sql = f"select sum(list_sum(top_weights)) / 20.0 + sum(len(tail_gaps)) / 6.0 from '{cache.root}/data/*.parquet'"
    found = duckdb.sql(sql).fetchall()[0][0]
    expected = sum(float(target(row.soft, 1.0).weights.double().sum()) for row in cache.dataset("train"))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("encoding", [Full(), TopK(4), TopP(0.7), Sampled(6.0)], ids=lambda e: e.kind)
def test_the_cards_own_lines_decode_a_row_with_numpy_alone(tmp_path, lm_tokenizer, encoding):
    """Runs the code block of the card unchanged on rows read by DuckDB."""
    cache = build_cache(tmp_path / "cache", lm_tokenizer, encoding=encoding)
    card = (cache.root / "README.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "import numpy" in block)
    names = [*cache.manifest.contract.columns]
    read = duckdb.sql(f"select * from '{cache.root}/data/*.parquet' order by source_row").fetchall()
    for row, ours in zip(read[:10], cache.dataset("train"), strict=False):
        scope: dict = {"row": dict(zip(names, row, strict=True))}
        exec(code, scope)
        goal = target(ours.soft, 1.0)
        assert len(scope["positions"]) == len(goal)
        for n, (ids, weights) in enumerate(scope["positions"]):
            part = slice(int(goal.offsets[n]), int(goal.offsets[n + 1]))
            assert list(ids) == goal.ids[part].tolist()
            np.testing.assert_allclose(weights, goal.weights[part].numpy(), rtol=2e-3, atol=1e-7)


def test_duckdb_reads_every_column(cache):
    rows = duckdb.sql(f"select * from '{cache.root}/data/*.parquet' order by source_row").fetchall()
    assert len(rows) == 60
    assert len(rows[0]) == len(cache.manifest.contract.columns)


def test_verify_finds_a_whole_cache_whole(cache):
    found = verify(cache.root)
    assert found.problems == ()
    assert (found.shards, found.rows) == (2, 60)
    Cache.open(cache.root, verify="full")


def test_a_quick_verification_reads_hashes_and_counts(cache, monkeypatch):
    monkeypatch.setattr("pipeline.cache.reading.verification.read_row_group", None)  # a call would fail
    assert verify(cache.root, quick=True).problems == ()
    path = Layout(cache.root).shard("train-00001")
    path.write_bytes(path.read_bytes()[:-200] + bytes(200))
    (problem,) = verify(cache.root, quick=True).problems
    assert str(path) in problem


def test_repair_drops_broken_shards_and_nothing_else(cache):
    layout = Layout(cache.root)
    damaged = bytearray(layout.shard("train-00001").read_bytes())
    damaged[200] ^= 4
    layout.shard("train-00001").write_bytes(damaged)
    whole = layout.shard("train-00000").read_bytes()
    done = CliRunner().invoke(main, ["verify", "--cache", str(cache.root), "--repair"])
    assert done.exit_code == 1
    assert "train-00001.parquet: row group 0" in done.output
    assert "dropped train-00001" in done.output
    assert not layout.shard("train-00001").exists()
    assert layout.shard("train-00000").read_bytes() == whole
    with pytest.raises(CacheError, match="was not finished"):
        Cache.open(cache.root)


def test_repair_without_a_plan_keeps_everything(cache):
    layout = Layout(cache.root)
    layout.plan.unlink()
    layout.shard("train-00001").write_bytes(b"no Parquet")
    done = CliRunner().invoke(main, ["verify", "--cache", str(cache.root), "--repair"])
    assert done.exit_code == 1
    assert "fetch or import the cache again" in done.output
    assert layout.manifest.is_file()
    assert layout.shard("train-00001").exists()


def test_every_bit_flip_is_found_and_names_its_file(cache):
    """`verify` reports each of 60 bit flips at random places of a shard."""
    path = Layout(cache.root).shard("train-00001")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(whole), 60):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        problems = verify(cache.root).problems
        assert len(problems) == 1
        assert "train-00001.parquet" in problems[0]
    path.write_bytes(whole)
    assert verify(cache.root).problems == ()


def test_damage_inside_a_row_group_stops_the_reader(cache):
    path = Layout(cache.root).shard("train-00000")
    start = pq.ParquetFile(path).metadata.row_group(0).column(6).data_page_offset
    data = bytearray(path.read_bytes())
    data[start + 40] ^= 4
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"train-00000\.parquet: row group 0 is damaged"):
        list(Cache.open(cache.root).dataset("train"))


def test_truncation_and_absence_and_extra_files(cache):
    layout = Layout(cache.root)
    whole = layout.shard("train-00000").read_bytes()
    layout.shard("train-00000").write_bytes(whole[:-100])
    with pytest.raises(IntegrityError, match=r"train-00000\.parquet: size differs"):
        Cache.open(cache.root)
    layout.shard("train-00000").unlink()
    with pytest.raises(IntegrityError, match="found no such file"):
        Cache.open(cache.root)
    layout.shard("train-00000").write_bytes(whole)
    shutil.copy(layout.shard("train-00000"), layout.data / "train-00009.parquet")
    with pytest.raises(IntegrityError, match=r"train-00009\.parquet: is not in manifest"):
        Cache.open(cache.root)
    assert any("train-00009" in problem for problem in verify(cache.root).problems)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=2), "format version: expected 1, found 2"),
        (lambda m: m["contract"].update(seed=1), "cache_id"),
        (lambda m: m["contract"]["encoding"].update(sample_size=7.0), "cache_id"),
        (lambda m: m["shards"][0].update(name="../../evil"), "plain file name"),
        (lambda m: m["shards"][0].update(rows="many"), r"shards\.0\.rows"),
        (lambda m: m.pop("contract"), "contract"),
    ],
)
def test_an_edited_manifest_is_refused(cache, change, message):
    path = Layout(cache.root).manifest
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match=message):
        Cache.open(cache.root)


def test_a_cache_without_its_tokenizer(cache):
    shutil.rmtree(cache.root / "tokenizer")
    assert any("tokenizer" in problem for problem in verify(cache.root).problems)


def test_what_is_no_cache(tmp_path):
    with pytest.raises(CacheError, match="no cache here"):
        Cache.open(tmp_path)
    with pytest.raises(CacheError, match=r"no cache here \(manifest.json is missing"):
        Cache.open(f"file://{tmp_path}/nothing", cache_dir=tmp_path / "fetched")


def test_an_unfinished_capture_says_so(tmp_path, lm_tokenizer):
    plan, _ = make_plan(lm_tokenizer, Sampled(6.0), 41, (ShardPlan("train-00000", "train", 0, 3),), tokens=True)
    begin(tmp_path / "cache", plan, lm_tokenizer)
    with pytest.raises(CacheError, match="was not finished"):
        Cache.open(tmp_path / "cache")


def test_another_contract_is_refused_and_the_first_difference_named(cache, lm_tokenizer):
    plan, _ = make_plan(lm_tokenizer, Sampled(7.0), 41, (ShardPlan("train-00000", "train", 0, 3),), tokens=True)
    with pytest.raises(ContractError, match=r"encoding\.sample_size: expected 6\.0, found 7\.0"):
        begin(cache.root, plan, lm_tokenizer)
    assert verify(cache.root).problems == ()
    begin(cache.root, plan, lm_tokenizer, overwrite=True)
    assert not Layout(cache.root).manifest.exists()


def test_overwrite_never_deletes_what_is_no_cache(tmp_path, lm_tokenizer):
    (tmp_path / "thesis.tex").write_text("years of work")
    plan, _ = make_plan(lm_tokenizer, Sampled(6.0), 41, (ShardPlan("train-00000", "train", 0, 3),), tokens=True)
    for overwrite in (True, False):
        with pytest.raises(CacheError, match="holds"):
            begin(tmp_path, plan, lm_tokenizer, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_overwrite_starts_anew_beside_the_mark_of_run(cache, lm_tokenizer):
    (cache.root / ".stage-cache-logits.json").write_text("{}")
    plan, _ = make_plan(lm_tokenizer, Sampled(7.0), 41, (ShardPlan("train-00000", "train", 0, 3),), tokens=True)
    begin(cache.root, plan, lm_tokenizer, overwrite=True)
    begin(cache.root, plan, lm_tokenizer, overwrite=True)
    assert not list(Layout(cache.root).data.iterdir())


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CacheError, match="the disk is full"):
        write_atomically(tmp_path / "shard", fail)
    assert list(tmp_path.iterdir()) == []


def test_of_two_writers_one_creates(tmp_path):
    assert create_exclusively(tmp_path / "manifest.json", "one")
    assert not create_exclusively(tmp_path / "manifest.json", "two")
    assert (tmp_path / "manifest.json").read_text() == "one"


def test_orphans_of_dead_processes_are_swept(tmp_path):
    """Temporary files from another machine are kept for a week, as their process may still run."""
    _, ours, name = temporary_path(tmp_path / "x").name.removeprefix(".tmp-").split("-")
    assert name == "x"
    living = {f".tmp-1-{ours}-train-00001.parquet", ".tmp-999999999-00000000-train-00002.parquet"}
    dead = {f".tmp-999999999-{ours}-train-00000.parquet", f".tmp-{10**30}-{ours}-a", ".tmp-999999999-00000000-old"}
    for file in living | dead:
        (tmp_path / file).write_text("half")
    os.utime(tmp_path / ".tmp-999999999-00000000-old", (0, 0))
    (tmp_path / f".tmp-999999999-{ours}-tokenizer").mkdir()
    (tmp_path / f".tmp-999999999-{ours}-tokenizer" / "tokenizer.json").write_text("half")
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == living


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_the_probe_refuses_a_cache_that_is_out_of_step(lm_tokenizer, shift):
    """The tokens are shifted by one position against the soft labels; only shift 0 is aligned."""
    import dataclasses

    from pipeline.cache.reading.probe import probe_alignment

    rows = []
    for n in range(40):
        row = token_row(n, Sampled(6.0), 41, length=60, known=True)
        example = dataclasses.replace(row.example, input_ids=np.roll(row.example.input_ids, shift))
        rows.append(dataclasses.replace(row, example=example))
    probe = probe_alignment([block_from(*rows[:25]), block_from(*rows[25:])])
    assert probe.positions >= 1000
    assert probe.verdict == ("aligned" if shift == 0 else "misaligned" if probe.aligned > 3 / 41 else "inconclusive")
    best = {-1: probe.previous, 0: probe.aligned, 1: probe.following}
    assert max(best, key=best.get) == shift
