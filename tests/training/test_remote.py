"""Training from a cache behind a URL takes the steps of the local cache without downloading it."""

from __future__ import annotations

import json

import numpy as np
import pytest

import pipeline as softlabel
from pipeline.cache import Cache
from pipeline.config import TrainStudentConfig
from pipeline.errors import CacheError
from pipeline.training.batches.ahead import look_ahead
from pipeline.training.batches.order import BatchOrder
from pipeline.training.run import run
from tests.conftest import tiny_model
from tests.support.flaky import flaky
from tests.support.rows import build_cache

__all__ = ["flaky"]

SHARDS, ROWS = 100, 3


@pytest.fixture
def cache(tmp_path, lm_tokenizer) -> Cache:
    """Return 300 rows in 100 row groups, so that the order does not start with all of them."""
    return build_cache(tmp_path / "cache", lm_tokenizer, classes=len(lm_tokenizer), per_shard=ROWS, shards=SHARDS)


@pytest.fixture
def student(save_teacher, lm_tokenizer):
    return save_teacher(tiny_model("llama", len(lm_tokenizer)), lm_tokenizer, "init")


def train(cache, student, output, **settings):
    """Train, and return the logged loss of each step."""
    logs = {"logging_steps": 1, "save_steps": 4, "save_strategy": "steps", "report_to": "none"}
    values = {"max_steps": 10, "batch_size": ROWS, "learning_rate": 1e-3, **settings}
    run(
        TrainStudentConfig(
            cache=str(cache),
            student=str(student),
            output=str(output),
            cache_dir=str(output.parent / "fetched"),
            training=logs,
            **values,
        )
    )
    newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    state = json.loads((newest / "trainer_state.json").read_text())
    return {
        entry["step"]: (entry["hard_loss"], entry["soft_loss"]) for entry in state["log_history"] if "loss" in entry
    }


def test_a_tenth_of_an_epoch_gives_the_same_losses_and_fetches_less_than_the_cache(tmp_path, cache, student, flaky):
    local = train(cache.root, student, tmp_path / "local")
    there = train(f"flaky://{cache.root}", student, tmp_path / "there")
    assert len(local) == 10
    assert there == local
    size = sum(shard.bytes for shard in cache.manifest.shards)
    assert 0.2 * size < flaky.fetched() < 0.8 * size
    names = [name for name, _ in flaky.log if name.endswith(".parquet")]
    assert len(names) == len(set(names))


@pytest.mark.full
def test_the_second_epoch_comes_from_this_machine(tmp_path, cache, student, flaky):
    steps = SHARDS * ROWS // 30
    train(f"flaky://{cache.root}", student, tmp_path / "there", max_steps=3 * steps, batch_size=30)
    assert flaky.fetched() == sum(shard.bytes for shard in cache.manifest.shards)


def test_a_network_that_dies_gives_one_line_and_the_run_goes_on_where_it_was(tmp_path, cache, student, flaky):
    local = train(cache.root, student, tmp_path / "local", max_steps=20)
    url = f"flaky://{cache.root}"
    flaky.die_after = 45
    with pytest.raises(CacheError, match=r"the network failed 4 times .*the cable is cut.* --resume") as caught:
        train(url, student, tmp_path / "there", max_steps=20)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "there").glob("checkpoint-*"))
    flaky.die_after = None
    fetched = flaky.fetched()
    there = train(url, student, tmp_path / "there", max_steps=20, resume=True)
    assert there == local
    names = [name for name, _ in flaky.log if name.endswith(".parquet")]
    assert len(names) == len(set(names)), "what was fetched before is not fetched again"
    assert flaky.fetched() > fetched


@pytest.mark.full
def test_a_student_is_evaluated_from_a_url(tmp_path, cache, student, flaky):
    there = Cache.open(f"flaky://{cache.root}", cache_dir=tmp_path / "fetched")
    ours = softlabel.evaluate(cache, {"s": student}, split="train").students[0]
    assert softlabel.evaluate(there, {"s": student}, split="train").students[0] == ours


class Rows:
    starts = np.cumsum([0] + [4] * 40)
    upcoming: tuple[int, ...] = ()

    def group_of(self, row):
        return row // 4


def test_the_same_batches_and_each_row_group_named_before_it_is_read():
    rows = Rows()
    batches = [list(range(i, i + 3)) for i in range(0, 159, 3)] + [[~5]]
    named, given = set(), []
    for batch in look_ahead(iter(batches), rows, 6):
        named |= set(rows.upcoming)
        assert {row // 4 for row in batch if row >= 0} <= named
        assert len(rows.upcoming) <= 7
        given.append(batch)
    assert given == batches


def test_what_a_resumed_run_skips_is_not_fetched(tmp_path, cache, flaky):
    rows = Cache.open(f"flaky://{cache.root}", cache_dir=tmp_path / "fetched").dataset("train")
    order = iter(BatchOrder(rows, ROWS, seed=0))
    for _ in range(90):
        next(order)
    assert flaky.fetched() == 0
