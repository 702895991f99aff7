"""A capture reports its progress after each batch, in one process and with workers."""

from __future__ import annotations

import logging

import pytest

from pipeline import progress as module
from pipeline.capture.engines import progress as engines
from pipeline.capture.engines.progress import Tally, Throttle
from pipeline.capture.run import run
from pipeline.progress import Progress
from pipeline.verbosity import at_level
from tests.support.captures import config  # noqa: F401 - a fixture
from tests.support.processes import forked  # noqa: F401 - a fixture


@pytest.fixture
def counted(monkeypatch, caplog):
    """A function that returns the progress lines of a capture, logged without throttling."""
    monkeypatch.setattr(module, "INTERVAL", 0.0)
    monkeypatch.setattr(engines, "_BETWEEN_MESSAGES", 0.0)

    def lines() -> list[str]:
        return [found for record in caplog.records if (found := record.getMessage()).startswith("cache-logits: ")]

    with at_level("info"), caplog.at_level(logging.INFO, "pipeline"):
        yield lines


def rows_of(lines: list[str]) -> list[int]:
    return [int(line.removeprefix("cache-logits: ").partition(" of ")[0]) for line in lines]


def test_one_process_moves_by_batch_and_ends_at_all_rows(config, counted):
    run(config("serial", rows_per_shard=60))
    lines = counted()
    assert len(lines) > 6  # two shards of several batches each
    assert rows_of(lines) == sorted(rows_of(lines))
    assert lines[-1].startswith("cache-logits: 52 of 52 rows (100%)")
    assert "tokens/s" in lines[0]
    assert " left" in lines[0]


def test_workers_report_their_batches(config, counted, forked):
    run(config("workers", rows_per_shard=20, num_workers=2))
    lines = counted()
    assert len(lines) > 6  # three shards
    assert lines[-1].startswith("cache-logits: 52 of 52 rows (100%)")
    assert "tokens/s" in lines[0]


def test_rows_that_were_made_before_are_done_and_not_in_the_rate(config, counted, caplog):
    assert run(config("parts", part="0/2")) is None
    caplog.clear()
    run(config("parts"))
    said, *lines = counted()
    assert said == "cache-logits: 5 of 9 shards are finished already"
    assert rows_of(lines)[0] > 26
    assert counted()[-1].startswith("cache-logits: 52 of 52 rows (100%)")


def test_a_worker_that_dies_takes_back_the_rows_of_its_shard_alone():
    tally = Tally(Progress("cache-logits", 30), {"a": 10, "b": 10, "c": 10})
    tally.moved(0, 6, 60)
    tally.moved(1, 9, 90)
    tally.made(1, "b")  # a row set aside is in no batch
    tally.moved(1, 5, 50)
    assert tally.progress.done == 21
    tally.lost(0)
    assert tally.progress.done == 15
    tally.made(1, "c")
    tally.made(0, "a")
    assert tally.progress.done == 30


def test_messages_are_sent_now_and_then_and_lose_nothing(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(engines.time, "monotonic", lambda: now[0])
    throttle = Throttle()
    assert not throttle.add(2, 20)
    assert not throttle.add(3, 30)
    now[0] = engines._BETWEEN_MESSAGES
    assert throttle.add(1, 10)
    assert throttle.drain() == (6, 60)
    assert not throttle.add(1, 10)
