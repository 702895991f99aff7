"""Progress output of long steps.

Occasional lines when the output is no terminal, a bar on a terminal, nothing under --quiet.
"""

from __future__ import annotations

import io
import logging
import sys

import pytest
import torch

from pipeline import progress as module
from pipeline.progress import Progress, duration, size, track
from pipeline.verbosity import at_level


class Clock:
    """A clock that a test advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def said(caplog):
    with at_level("info"), caplog.at_level(logging.INFO, "pipeline"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name == module.__name__]


def test_a_line_every_30_seconds_with_rates_and_the_time_left(clock, said):
    with Progress("cache-logits", 50_000, clock=clock) as progress:
        for second in range(1, 62):
            clock.now = second
            progress.update(250, tokens=5000)
    first, second, last = said()
    assert first == "cache-logits: 7,500 of 50,000 rows (15%), 250 rows/s, 5,000 tokens/s, 2 min 50 s left"
    assert second.startswith("cache-logits: 15,000 of 50,000 rows (30%), 250 rows/s")
    assert last == "cache-logits: 15,250 of 50,000 rows (30%), 250 rows/s, 5,000 tokens/s, in 1 min 1 s"


def test_a_short_step_says_nothing(clock, said):
    with Progress("verify", 10, clock=clock) as progress:
        clock.now = 29.9
        progress.update(10)
    assert said() == []


def test_what_was_finished_before_counts_as_done_and_not_in_the_rate(clock, said):
    with Progress("cache-logits", 1000, initial=600, clock=clock) as progress:
        clock.now = 30
        progress.update(100)
    assert said()[0] == "cache-logits: 700 of 1,000 rows (70%), 3.33 rows/s, 1 min 30 s left"


def test_rows_that_are_taken_back_are_done_again(clock, said):
    progress = Progress("cache-logits", 100, clock=clock)
    progress.update(60)
    clock.now = 30
    progress.update(-20)
    assert said() == ["cache-logits: 40 of 100 rows (40%), 1.33 rows/s, 45 s left"]


def test_steps_have_a_note_and_the_rates_of_rows(clock, said):
    progress = Progress("train-student", 200, unit="step", clock=clock)
    progress.update(0, note="loss 0.812")
    clock.now = 40
    progress.update(50, rows=800, tokens=torch.tensor(40_000))
    assert said() == ["train-student: 50 of 200 steps (25%), loss 0.812, 20 rows/s, 1,000 tokens/s, 2 min 0 s left"]


def test_bytes_and_an_unknown_total(clock, said):
    sent, read = Progress("push", 5 * 10**9, unit="B", clock=clock), Progress("import", clock=clock)
    clock.now = 30
    sent.update(1_200_000_000)
    read.update(12_288)
    assert said() == ["push: 1.2 GB of 5 GB (24%), 40 MB/s, 1 min 35 s left", "import: 12,288 rows, 410 rows/s"]


def test_a_step_that_fails_has_no_last_line(monkeypatch, said):
    def failing():
        yield 1
        raise ValueError("broken")

    monkeypatch.setattr(module, "INTERVAL", 0.0)
    with pytest.raises(ValueError, match="broken"):
        list(track(failing(), "audit", 4))
    assert len(said()) == 1


@pytest.mark.parametrize("level", ["warning", "error"])
def test_quiet_and_other_ranks_say_nothing(clock, said, level):
    with at_level(level), Progress("merge", 4, clock=clock) as progress:
        clock.now = 31
        progress.update(1)
    with Progress("merge", 4, shown=False, clock=clock) as progress:
        clock.now = 99
        progress.update(1)
    assert said() == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_the_time_left(monkeypatch, said):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(module, "INTERVAL", 0.0)
    monkeypatch.setattr(module, "_BAR_INTERVAL", 0.0)
    with Progress("evaluate", 8, initial=2) as progress:
        progress.update(3, tokens=30, note="loss 0.5")
        progress.update(3, tokens=30)
    shown = terminal.getvalue().split("\r")[-1]
    assert "evaluate: 100%" in shown
    assert "8/8" in shown
    assert "loss 0.5" in shown
    assert "tokens/s" in shown
    assert said() == []  # the bar replaces the lines


def test_a_quiet_terminal_gets_no_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with at_level("warning"), Progress("evaluate", 8) as progress:
        progress.update(8)
    assert terminal.getvalue() == ""


def test_track_gives_the_same_items_and_counts_the_rest_of_a_stride(monkeypatch, said):
    monkeypatch.setattr(module, "INTERVAL", 0.0)
    assert list(track(range(10), "read train", 10, stride=4)) == list(range(10))
    counts = [line.partition(" of ")[0] for line in said()]
    assert counts == ["read train: 4", "read train: 8", "read train: 10", "read train: 10"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (130, "2 min 10 s"), (7500, "2 h 5 min"), (273_700, "3 d 4 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (128 << 20, "134 MB")])
def test_sizes(count, text):
    assert size(count) == text
