"""Two captures in one directory: only the holder of a shard's claim writes the shard."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading

import pytest

from pipeline.cache.format.manifest import Layout
from pipeline.cache.writing.build import begin
from pipeline.cache.writing.claims import Claims, sweep_claims
from pipeline.errors import CacheError, ContractError
from pipeline.records import Sampled, ShardPlan
from tests.support.rows import build_cache, make_plan

SHARDS = tuple(ShardPlan(f"train-{i:05d}", "train", i * 3, i * 3 + 3) for i in range(3))


@pytest.fixture
def started(tmp_path, lm_tokenizer):
    plan, _ = make_plan(lm_tokenizer, Sampled(6.0), 41, SHARDS, tokens=True)
    return begin(tmp_path / "cache", plan, lm_tokenizer), plan


@contextlib.contextmanager
def claim(layout, plan, name):
    """The claim of one shard, held as another process would."""
    with Claims(layout, plan) as claims:
        yield claims.hold(name)


def claimed(layout, plan, shards):
    """Yield shards taken one after another, each released before the next."""
    with Claims(layout, plan) as claims:
        for shard in claims.take(shards):
            yield shard
            claims.release(shard.name)


def test_several_claims_are_held_at_a_time(started):
    layout, plan = started
    with Claims(layout, plan) as claims, Claims(layout, plan) as others:
        taken = claims.take(SHARDS)
        assert [next(taken).name, next(taken).name] == ["train-00000", "train-00001"]
        assert not others.hold("train-00000")
        claims.release("train-00000")
        assert others.hold("train-00000")
        assert not others.hold("train-00001")
    assert not list(layout.plan.parent.glob(".claim-*"))


def test_a_thread_that_comes_after_the_end_holds_nothing(started):
    """A reader thread that outlives a failed capture takes no claim.

    Otherwise the next capture would wait for that claim.
    """
    layout, plan = started
    with Claims(layout, plan) as claims:
        ahead = claims.take(SHARDS)
    assert list(ahead) == []
    assert not claims.hold("train-00000")
    assert not list(layout.plan.parent.glob(".claim-*"))
    with claim(layout, plan, "train-00000") as mine:
        assert mine


def test_a_claim_is_one_process_s(started):
    layout, plan = started
    with claim(layout, plan, "train-00000") as mine:
        assert mine
        with claim(layout, plan, "train-00000") as second:
            assert not second
    assert [shard.name for shard in claimed(layout, plan, SHARDS)] == [shard.name for shard in SHARDS]
    assert not list(layout.plan.parent.glob(".claim-*"))


def test_waiting_ends_when_the_claim_is_free(started):
    layout, plan = started
    held, go = threading.Event(), threading.Event()

    def other() -> None:
        with claim(layout, plan, "train-00001"):
            held.set()
            go.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    held.wait(10)
    order = []
    for shard in claimed(layout, plan, SHARDS):
        order.append(shard.name)
        if len(order) == 2:
            go.set()
    thread.join()
    assert order == ["train-00000", "train-00002", "train-00001"]


def test_the_claim_of_a_dead_process_is_free(started):
    layout, plan = started
    left = layout.plan.parent / ".claim-train-00000"
    left.touch()
    assert [shard.name for shard in claimed(layout, plan, SHARDS[:1])] == ["train-00000"]
    left.touch()
    sweep_claims(layout, plan)
    assert not left.exists()


def test_what_another_has_finished_is_left_out(tmp_path, lm_tokenizer):
    cache = build_cache(tmp_path / "cache", lm_tokenizer)
    from pipeline.cache.format.manifest import Plan, parse

    layout = Layout(cache.root)
    plan = parse(Plan, layout.plan)
    assert list(claimed(layout, plan, plan.shards)) == []
    layout.shard("train-00001").write_bytes(b"damaged")
    assert [shard.name for shard in claimed(layout, plan, plan.shards)] == ["train-00001"]


def test_overwrite_leaves_a_cache_alone_that_somebody_writes(started, lm_tokenizer):
    layout, plan = started
    other, _ = make_plan(lm_tokenizer, Sampled(7.0), 41, SHARDS, tokens=True)
    with claim(layout, plan, "train-00000"), pytest.raises(CacheError, match="another process is writing this cache"):
        begin(layout.root, other, lm_tokenizer, overwrite=True)
    assert layout.plan.is_file()
    assert not list(layout.root.glob(".tmp-*"))


@pytest.mark.parametrize("again", [True, False])
def test_a_capture_whose_directory_was_taken_stops(started, lm_tokenizer, again):
    layout, plan = started
    other, _ = make_plan(lm_tokenizer, Sampled(7.0), 41, SHARDS, tokens=True)

    def taken() -> None:
        for _ in claimed(layout, plan, SHARDS):
            shutil.rmtree(layout.root)
            if again:
                begin(layout.root, other, lm_tokenizer)

    with pytest.raises(ContractError, match=r"has begun here|was removed"):
        taken()


def test_overwrite_goes_on_where_it_was_killed(tmp_path, lm_tokenizer):
    """A run killed after moving the receipts and deleting the manifest is continued."""
    cache = build_cache(tmp_path / "cache", lm_tokenizer)
    layout = Layout(cache.root)
    os.replace(layout.plan.parent, layout.root / ".tmp-999999999-00000000-receipts")
    layout.manifest.unlink()
    plan, _ = make_plan(lm_tokenizer, Sampled(7.0), 41, SHARDS, tokens=True)
    begin(cache.root, plan, lm_tokenizer, overwrite=True)
    assert not list(layout.data.iterdir())
