"""Reading a cache from a URL.

Rows equal those of the local cache, are fetched on demand, stored locally within a size limit,
and survive network failures.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import pickle
import shutil

import pytest
import torch

from pipeline.cache import Cache
from pipeline.cache.reading import remote
from pipeline.cache.storage.store import Store, default_directory
from pipeline.cache.storage.transfer import patiently
from pipeline.errors import CacheError, IntegrityError
from pipeline.records import Full
from tests.support.flaky import flaky
from tests.support.rows import build_cache

__all__ = ["flaky"]


@pytest.fixture
def cache(tmp_path, lm_tokenizer):
    return build_cache(tmp_path / "cache", lm_tokenizer, per_shard=5, shards=8)


@pytest.fixture
def url(cache):
    return f"flaky://{cache.root}"


def open_url(url, tmp_path, **settings):
    return Cache.open(url, cache_dir=tmp_path / "fetched", **settings)


def assert_same_rows(a, b):
    assert len(a) == len(b)
    for ours, theirs in zip(a, b, strict=True):
        assert ours.content_hash == theirs.content_hash
        assert torch.equal(ours.soft.top_ids, theirs.soft.top_ids)
        assert torch.equal(ours.soft.tail_ids, theirs.soft.tail_ids)


def by_pieces(monkeypatch, rows=2):
    """Read small shards in the way of large ones: the end of the file first, then row groups."""
    monkeypatch.setattr(remote, "_SMALL", 0)
    monkeypatch.setattr(remote, "_TAIL", 2048)
    monkeypatch.setattr("pipeline.cache.writing.writer._MAX_ROWS", rows)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "pieces"])
def test_the_same_rows_and_the_second_time_no_byte(tmp_path, lm_tokenizer, flaky, monkeypatch, whole):
    if not whole:
        by_pieces(monkeypatch)
    cache = build_cache(tmp_path / "cache", lm_tokenizer, per_shard=5, shards=8)
    there = open_url(f"flaky://{cache.root}", tmp_path)
    assert there.manifest == cache.manifest
    assert there.tokenizer.get_vocab() == cache.tokenizer.get_vocab()
    assert flaky.fetched() == 0
    assert_same_rows(there.dataset("train"), cache.dataset("train"))
    first = flaky.fetched()
    assert first >= sum(shard.bytes for shard in cache.manifest.shards) - 100
    assert_same_rows(open_url(f"flaky://{cache.root}", tmp_path).dataset("train"), cache.dataset("train"))
    assert flaky.fetched() == first


def test_only_what_is_read_is_fetched(tmp_path, lm_tokenizer, flaky, monkeypatch):
    by_pieces(monkeypatch, rows=50)
    monkeypatch.setattr(remote, "_TAIL", 1 << 16)
    monkeypatch.setattr(remote.Remote, "announce", lambda *args: None)
    cache = build_cache(tmp_path / "cache", lm_tokenizer, encoding=Full(), per_shard=400, shards=2)
    rows = open_url(f"flaky://{cache.root}", tmp_path).dataset("train")
    _ = rows[3]
    names = {name for name, _ in flaky.log if name.endswith(".parquet")}
    assert names == {"train-00000.parquet"}
    assert flaky.fetched() < 0.4 * cache.manifest.shards[0].bytes
    before = flaky.fetched()
    assert rows.num_tokens().tolist() == cache.dataset("train").num_tokens().tolist()
    assert flaky.fetched() - before < 0.4 * sum(shard.bytes for shard in cache.manifest.shards)
    assert rows.column("source_row").tolist() == list(range(800))


def test_what_comes_next_is_fetched_ahead(tmp_path, url, flaky):
    rows = open_url(url, tmp_path).dataset("train")
    rows.upcoming = (0, 5)
    _ = rows[0]
    wait_until(lambda: "train-00005.parquet" in [name for name, _ in flaky.log])
    flaky.failures = -1
    assert rows[27].example.source_row == 27
    with pytest.raises(CacheError):
        _ = rows[39]


def wait_until(condition):
    import time

    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.05)


def test_a_failing_network_is_tried_again_and_then_named(tmp_path, url, flaky, caplog):
    caplog.set_level(logging.INFO, "pipeline")
    flaky.failures = 2
    there = open_url(url, tmp_path)
    assert "connection reset by peer; trying again" in caplog.text
    flaky.failures = 3
    rows = there.dataset("train")
    assert rows[0].example.source_row == 0
    flaky.failures = -1
    with pytest.raises(CacheError, match=r"train-00007\.parquet: the network failed 4 times in 0 s .*reset by peer"):
        _ = rows[39]
    flaky.failures = 0
    assert rows[39].example.source_row == 39


def test_a_stalled_request_is_given_up(tmp_path, url, flaky, monkeypatch):
    rows = open_url(url, tmp_path).dataset("train")
    monkeypatch.setattr("pipeline.cache.storage.transfer.TIMEOUT", 0.1)
    flaky.stalls = 1
    assert rows[0].example.source_row == 0
    flaky.stalls = 100
    with pytest.raises(CacheError, match=r"no answer within 0\.1 s"):
        _ = rows[10]


def test_what_another_attempt_would_not_mend_is_not_tried_again():
    calls = []

    def refuse():
        calls.append(1)
        raise PermissionError("https://user:secret@host/x: 403")

    with pytest.raises(CacheError) as caught:
        patiently("there", refuse)
    assert len(calls) == 1
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "pieces"])
def test_damage_on_the_way_or_in_the_store_is_fetched_again(tmp_path, lm_tokenizer, flaky, monkeypatch, whole):
    if not whole:
        by_pieces(monkeypatch)
    monkeypatch.setattr(remote.Remote, "announce", lambda *args: None)
    cache = build_cache(tmp_path / "cache", lm_tokenizer, per_shard=5, shards=4)
    url = f"flaky://{cache.root}"
    there = open_url(url, tmp_path)
    flaky.damaged = 1
    assert_same_rows(there.dataset("train"), cache.dataset("train"))
    assert flaky.damaged == 0
    for piece in (tmp_path / "fetched").glob("*/pieces/*/*"):
        data = bytearray(piece.read_bytes())
        if data:
            data[len(data) // 2] ^= 4
        piece.write_bytes(data)
    assert_same_rows(there.dataset("train"), cache.dataset("train"))


def test_a_whole_shard_is_compared_with_its_sha256(tmp_path, lm_tokenizer, flaky, monkeypatch):
    """Damage outside every data page is found by the hash of the file alone."""
    by_pieces(monkeypatch, rows=100)
    monkeypatch.setattr(remote, "_TAIL", 1 << 16)
    monkeypatch.setattr(remote.Remote, "announce", lambda *args: None)
    cache = build_cache(tmp_path / "cache", lm_tokenizer, encoding=Full(), per_shard=200, shards=1)
    path = cache.root / "data" / "train-00000.parquet"
    data = bytearray(path.read_bytes())
    at = len(data) - 8 - int.from_bytes(data[-8:-4], "little")  # the footer, which has a hash of its own
    data[at - 1] ^= 1  # the page index before it
    path.write_bytes(data)
    rows = open_url(f"flaky://{cache.root}", tmp_path).dataset("train")
    assert rows[0].example.source_row == 0  # one of two row groups
    with pytest.raises(IntegrityError, match=r"train-00000\.parquet: sha256 differs"):
        list(rows)


def test_what_is_not_what_the_manifest_says(tmp_path, cache, url, flaky):
    shard = cache.root / "data" / "train-00003.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(IntegrityError, match=r"train-00003\.parquet: expected \d+ bytes"):
        open_url(url, tmp_path)
    flipped = bytearray(whole)
    flipped[200] ^= 4
    shard.write_bytes(flipped)
    with pytest.raises(IntegrityError, match=r"flaky:.*train-00003\.parquet: sha256 differs"):
        list(open_url(url, tmp_path).dataset("train"))
    shard.write_bytes(whole)
    shutil.copy(shard, shard.with_name("train-00009.parquet"))
    with pytest.raises(IntegrityError, match="is not in manifest"):
        open_url(url, tmp_path)
    shard.with_name("train-00009.parquet").unlink()
    shutil.copytree(cache.root / "tokenizer", tmp_path / "tokenizer")
    path = cache.root / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {key: value for key, value in content["model"]["vocab"].items() if value < 20}
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match=r"flaky:.*tokenizer"):
        open_url(url, tmp_path / "elsewhere")


def test_a_manifest_of_another_release_names_the_url(tmp_path, cache, url, flaky):
    path = cache.root / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(IntegrityError, match=r"^flaky://.*manifest\.json: format version: expected 1, found 2"):
        open_url(url, tmp_path)
    assert not list((tmp_path / "fetched").iterdir())


def test_no_such_file_system():
    with pytest.raises(CacheError, match="nonsense://cache: cannot be opened"):
        Cache.open("nonsense://cache")


def test_a_cache_behind_a_url_is_verified_by_pulling_it(tmp_path, url, flaky):
    with pytest.raises(CacheError, match=r"softlabel pull --from flaky://"):
        open_url(url, tmp_path).verify()


def test_the_store_keeps_within_its_bound(tmp_path, cache, url, flaky):
    total = sum(shard.bytes for shard in cache.manifest.shards)
    there = open_url(url, tmp_path, cache_bytes=total // 2)
    assert_same_rows(there.dataset("train"), cache.dataset("train"))
    kept = sum(path.stat().st_size for path in (tmp_path / "fetched").glob("*/pieces/*/*"))
    assert 0 < kept <= total // 2
    assert_same_rows(there.dataset("train"), cache.dataset("train"))


def test_what_was_used_longest_ago_goes_first(tmp_path):
    store = Store(tmp_path, 250)
    for name in ("a", "b"):
        store.write(f"cache/pieces/x/{name}", bytes(100))
    assert store.read("cache/pieces/x/a") is not None
    store.write("cache/pieces/x/c", bytes(100))
    assert [store.holds(f"cache/pieces/x/{name}") for name in "abc"] == [True, False, True]
    assert store.read("cache/pieces/x/b") is None


def test_other_processes_write_to_the_store_too(tmp_path):
    ours, theirs = Store(tmp_path, 1000), Store(tmp_path, 1000)
    for i in range(30):
        (ours if i % 2 else theirs).write(f"cache/pieces/x/{i}", bytes(60))
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 1060


def test_a_worker_that_was_forked_fetches_by_itself(tmp_path, cache, url, flaky):
    """`DataLoader` may fork its workers while fetching threads are running and hold locks."""
    rows = open_url(url, tmp_path).dataset("train")
    rows.upcoming = (0, 1, 2)
    _ = rows[0]

    def read(found):
        rows.upcoming = (6, 7)
        found.put(rows[33].example.source_row)

    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()
    worker = context.Process(target=read, args=(found,), daemon=True)
    wait_until(lambda: {f"train-0000{i}.parquet" for i in range(3)} <= {name for name, _ in flaky.log})
    with rows.remote._guard, rows.remote.store._lock:  # as if a thread held them
        worker.start()
    worker.join(10)
    assert worker.exitcode == 0
    assert found.get() == 33


def test_a_network_that_dies_while_a_footer_is_read(tmp_path, lm_tokenizer, flaky, monkeypatch):
    """An error while PyArrow reads bytes that were not prefetched passes through it unchanged."""
    by_pieces(monkeypatch)
    cache = build_cache(tmp_path / "cache", lm_tokenizer, per_shard=30, shards=1)
    rows = open_url(f"flaky://{cache.root}", tmp_path).dataset("train")
    flaky.die_after = 1
    with pytest.raises(CacheError, match=r"the network failed 4 times"):
        _ = rows[0]


def test_rows_behind_a_url_are_picklable(tmp_path, url, flaky):
    rows = open_url(url, tmp_path).dataset("train")
    rows.upcoming = (0, 1)
    _ = rows[0]
    assert pickle.loads(pickle.dumps(rows))[31].example.source_row == 31


def test_the_users_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "softlabel"
