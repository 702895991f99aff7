"""Ranges of source rows, appended rows, outputs at URLs, and the automatic batch size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import pipeline as softlabel
from pipeline.cache import Cache, Layout, drop_broken, verify
from pipeline.cache.storage.urls import open_filesystem
from pipeline.capture import automatic, shard
from pipeline.capture.engines import in_process
from pipeline.capture.run import run
from pipeline.errors import CacheError, ContractError, MisuseError, ModelError, PipelineError
from tests.conftest import tiny_model
from tests.support.captures import config, hashes  # noqa: F401 - a fixture
from tests.support.processes import forked  # noqa: F401 - a fixture
from tests.support.s3 import bucket, s3_server  # noqa: F401 - fixtures

# -------------------------------------------------------------------------------- parts of a source


def test_rows_are_a_part_of_the_source_and_their_numbers_are_the_sources(config):
    whole, part = run(config("whole", rows_per_shard=10)), run(config("part", rows_per_shard=10, rows="10:30"))
    rows = [row.example.source_row for row in part.dataset("train")]
    assert sorted(set(rows)) == list(range(10, 30))
    assert part.splits == ("train", "test")
    assert sorted({row.example.source_row for row in part.dataset("test")}) == [10, 11]
    # The shards are equal except for their names.
    assert list(hashes(part).values())[:2] == [hashes(whole)[f"train-0000{i}"] for i in (1, 2)]
    with pytest.raises(PipelineError, match="--rows 50:60: no split has such rows; the longest has 40"):
        run(config("none", rows="50:60"))
    with pytest.raises(MisuseError, match="--rows: expected A:B"):
        config(rows="60:50")


def test_new_rows_are_appended_and_old_shards_stay(config, forked, tmp_path):
    first = run(config())
    assert run(config(append=True)).manifest == first.manifest  # nothing to append
    train = Path(config().data.dataset) / "train.jsonl"
    lines = train.read_text().splitlines()
    train.write_text("\n".join([*lines, *lines[:8]]) + "\n")
    with pytest.raises(ContractError, match=r"fingerprints.*--append where the data set has only gained rows"):
        run(config())
    assert Cache.open(tmp_path / "cache").manifest == first.manifest
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "data").iterdir()}
    grown = run(config(append=True, num_workers=2))
    assert {name: hashes(grown)[name] for name in hashes(first)} == hashes(first)
    assert all((tmp_path / "cache" / "data" / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    assert [shard.name for shard in grown.manifest.shards[-2:]] == ["train-00007", "train-00008"]
    assert [a.operation for a in grown.manifest.ancestry] == ["append"]
    assert grown.manifest.ancestry[0].cache_id == first.manifest.cache_id != grown.manifest.cache_id
    rows = [row.example.source_row for row in grown.dataset("train")]
    assert sorted(set(rows)) == list(range(48))
    assert verify(grown.root).problems == ()
    assert run(config(append=True)).manifest == grown.manifest
    with pytest.raises(ContractError, match=r"--append: seed: expected 0, found 1"):
        run(config(append=True, seed=1))
    train.write_text("\n".join([*lines[1:], *lines]) + "\n")
    with pytest.raises(ContractError, match="expected the 48 rows that were cached to come first, unchanged"):
        run(config(append=True))
    assert Cache.open(tmp_path / "cache").manifest == grown.manifest


@pytest.mark.full
def test_an_append_that_was_stopped_goes_on_and_the_old_cache_stands_meanwhile(config, tmp_path, monkeypatch):
    first = run(config())
    train = Path(config().data.dataset) / "train.jsonl"
    train.write_text(train.read_text() * 2)
    finish = in_process.finish_when_whole
    monkeypatch.setattr(in_process, "finish_when_whole", lambda *_: sys.exit("stopped"))
    with pytest.raises(SystemExit):
        run(config(append=True))
    assert Cache.open(tmp_path / "cache").manifest == first.manifest  # new shards do not count yet
    assert verify(tmp_path / "cache").problems == ()
    monkeypatch.setattr(in_process, "finish_when_whole", finish)
    grown = run(config(append=True))
    assert grown.manifest.ancestry[0].cache_id == first.manifest.cache_id
    train.write_text(train.read_text() * 2)  # append a second time
    again = run(config(append=True))
    assert [a.cache_id for a in again.manifest.ancestry] == [first.manifest.cache_id, grown.manifest.cache_id]
    assert verify(again.root).problems == ()


def test_a_cache_that_was_appended_to_is_repaired_by_the_same_command(config, tmp_path):
    run(config())
    train = Path(config().data.dataset) / "train.jsonl"
    train.write_text(train.read_text() * 2)
    grown = run(config(append=True))
    for name in ("train-00001", "train-00009"):
        Layout(grown.root).shard(name).write_bytes(b"damaged")
    drop_broken(grown.root, verify(grown.root))
    assert run(config(append=True)).manifest == grown.manifest
    Layout(grown.root).shard("train-00002").write_bytes(b"damaged")
    assert run(config(append=True)).manifest == grown.manifest


def test_a_stopped_append_that_is_cut_otherwise_leaves_nothing_of_the_first(config, tmp_path, monkeypatch):
    run(config())
    train = Path(config().data.dataset) / "train.jsonl"
    lines = train.read_text()
    train.write_text(lines * 2)
    finish = in_process.finish_when_whole
    monkeypatch.setattr(in_process, "finish_when_whole", lambda *_: sys.exit("stopped"))
    with pytest.raises(SystemExit):
        run(config(append=True))
    monkeypatch.setattr(in_process, "finish_when_whole", finish)
    train.write_text(lines)
    with pytest.raises(ContractError, match="7 more shards were begun here, and there are no rows for them"):
        run(config(append=True))
    train.write_text(lines * 2)
    grown = run(config(append=True, rows_per_shard=20))
    assert verify(grown.root).problems == ()
    assert len(grown.manifest.split_shards("train")) == 9


def test_a_source_in_memory_is_appended_too(tmp_path, lm_tokenizer):
    model = tiny_model("gpt2", len(lm_tokenizer), spread=3.0)
    texts = ["the cat sat on the mat", "the dog ran over the hill", "the bird flew home"]
    settings = {"task": "causal-lm", "tokenizer": lm_tokenizer}
    softlabel.cache_logits(model, Dataset.from_dict({"text": texts[:2]}), tmp_path / "c", **settings)
    cache = softlabel.cache_logits(model, Dataset.from_dict({"text": texts}), tmp_path / "c", append=True, **settings)
    assert [row.example.source_row for row in cache.dataset("train")] == [0, 1, 2]


# ---------------------------------------------------------------------------------- outputs at URLs


@pytest.mark.full
def test_a_cache_is_made_on_s3_by_two_parts(config, bucket, tmp_path, caplog):
    local = run(config("local"))
    url = f"{bucket}/caches/one"
    assert run(config(output=url, part="0/2")) is None
    filesystem, root = open_filesystem(url)
    assert not filesystem.exists(f"{root}/manifest.json")
    made = run(config(output=url, part="1/2"))
    assert hashes(made) == hashes(local)
    assert [row.content_hash for row in made.dataset("train")] == [row.content_hash for row in local.dataset("train")]
    with pytest.raises(ContractError, match=r"holds another capture: contract\.seed"):
        run(config(output=url, seed=1))
    assert run(config(output=url)).manifest == local.manifest  # already finished
    filesystem.get(root, str(tmp_path / "copy"), recursive=True)
    copy = Cache.open(tmp_path / "copy", verify="full")
    assert copy.manifest == local.manifest
    everything = "".join(p.read_text() for p in (tmp_path / "copy").rglob("*.json")) + caplog.text
    assert "planted" not in everything
    run(config(output=url, seed=1, overwrite=True))
    filesystem.invalidate_cache()
    assert json.loads(filesystem.cat_file(f"{root}/manifest.json"))["contract"]["seed"] == 1


@pytest.mark.full
def test_shards_sent_before_a_stop_are_not_made_again(config, bucket, monkeypatch):
    url = f"{bucket}/cache"
    whole, made = shard.record, []

    def record(layout, receipt):
        if len(made) == 4:
            raise CacheError("stopped")
        made.append(receipt.plan.name)
        whole(layout, receipt)

    monkeypatch.setattr(shard, "record", record)
    with pytest.raises(CacheError, match="stopped"):
        run(config(output=url))
    monkeypatch.setattr(
        shard, "record", lambda layout, receipt: (made.append(receipt.plan.name), whole(layout, receipt))
    )
    run(config(output=url))
    assert len(made) == len(set(made)) == 9


def test_a_url_that_cannot_be_reached_is_one_line_without_its_password(config, bucket):
    with pytest.raises(CacheError, match="cannot be opened"):
        run(config(output="nowhere://user:secret-password@host/cache"))
    with pytest.raises(CacheError) as caught:
        run(config(output="s3://no-such-bucket-anywhere/cache"))
    assert "\n" not in str(caught.value)
    for text in ("secret-password", "planted"):
        assert text not in str(caught.value)


# ------------------------------------------------------------------------------- the forward pass


def test_the_batch_is_found_once_and_kept(config, monkeypatch):
    seconds = iter([1.0, 1.0, 0.9, 1.77])  # for 256, 512, 1,024, 2,048 tokens: the last gains little
    monkeypatch.setattr(automatic, "_seconds", lambda *_: next(seconds))
    cache = run(config(batch_tokens=None, auto_batch_tokens=True))
    assert cache.manifest.contract.batch_tokens == 1024
    Layout(cache.root).shard("train-00001").unlink()
    again = run(config(batch_tokens=None, auto_batch_tokens=True))  # no second search: the iterator is empty
    assert again.manifest == cache.manifest


def test_the_batch_that_is_found_runs(config):
    cache = run(config(batch_tokens=None, auto_batch_tokens=True))
    assert cache.manifest.contract.batch_tokens >= 256


def test_out_of_memory_names_the_flag(config, monkeypatch):
    def forward(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(in_process, "check_head", lambda job: None)
    monkeypatch.setattr(shard, "forward", forward)
    with pytest.raises(ModelError, match=r"rows of 64 tokens.*--batch-tokens 128 --overwrite"):
        run(config())


@pytest.mark.full
def test_a_compiled_teacher_says_the_same_and_is_another_contract(config):
    plain, compiled = run(config("plain")), run(config("compiled", torch_compile="eager"))
    assert compiled.manifest.contract.teacher.compiler == "eager"
    for split in plain.splits:
        for a, b in zip(plain.dataset(split), compiled.dataset(split), strict=True):
            assert a.teacher_nll_sum == pytest.approx(b.teacher_nll_sum, rel=1e-4)
    with pytest.raises(ContractError, match=r"teacher\.compiler"):
        run(config("plain", torch_compile="eager"))
    with pytest.raises(MisuseError, match="--torch-compile nothing: expected one of"):
        run(config("none", torch_compile="nothing"))
