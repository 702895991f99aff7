"""The order and content of leaderboard lines, on synthetic runs."""

from __future__ import annotations

import pytest

from pipeline.config import SweepConfig
from pipeline.records import Interval, Loss, TrainResult
from pipeline.sweep.leaderboard import SweepRun, format_leaderboard, make_report
from pipeline.tasks import get_task

CONFIG = SweepConfig(cache=("c",), student=("s",), output="out")


def made_up(group: str, seed: int, metrics: dict[str, float] | None, role: str = "student") -> SweepRun:
    loss = Loss()
    result = None
    if metrics is not None:
        result = TrainResult(
            "o", "id", loss, 1e-3, seed, 10, 10.0 + seed, 0.1, 0.1, 2_000_000, 2_000_000, 48, "v", metrics
        )
    return SweepRun(
        name=f"{group}-seed{seed}",
        group=group,
        role=role,
        cache="c",
        cache_id="id",
        student="s",
        seed=seed,
        loss=loss,
        teacher_labels=False,
        directory=f"runs/{group}-seed{seed}",
        result=result,
        error="diverged" if metrics is None else None,
    )


def ranked(task: str, runs: list[SweepRun], teachers=None):
    return make_report(CONFIG, get_task(task), runs, teachers or {}, "validation")


def test_higher_accuracy_first_and_ties_by_the_loss():
    runs = [
        made_up("low", 0, {"accuracy": 0.5, "nll": 0.1}),
        made_up("tie-worse", 0, {"accuracy": 0.8, "nll": 0.6}),
        made_up("tie-better", 0, {"accuracy": 0.8, "nll": 0.4}),
        made_up("control", 0, {"accuracy": 0.9, "nll": 0.3}, role="control"),
        made_up("failed", 0, None),
    ]
    found = ranked("sequence-classification", runs)
    assert [group.name for group in found.groups] == ["control", "tie-better", "tie-worse", "low", "failed"]
    assert found.best == "tie-better"  # a control is not chosen, however good
    assert [run.name for run in found.failed] == ["failed-seed0"]


def test_lower_loss_first_for_language_models():
    runs = [made_up(name, 0, {"accuracy": 0.1, "nll": nll}) for name, nll in (("a", 3.0), ("b", 2.0), ("c", 4.0))]
    found = ranked("causal-lm", runs)
    assert [group.name for group in found.groups] == ["b", "a", "c"]
    assert (found.chosen_by, found.higher_is_better) == ("nll", False)


def test_seeds_make_one_line_of_their_means():
    runs = [
        made_up("a", 0, {"accuracy": 0.7, "nll": 0.5}),
        made_up("a", 1, {"accuracy": 0.9, "nll": 0.7}),
        made_up("a", 2, None),
        made_up("b", 0, {"accuracy": 0.75, "nll": 0.5}),
    ]
    found = ranked("sequence-classification", runs, {"c": {"accuracy": 0.95, "loss": 0.2}})
    first, second = found.groups
    assert (first.name, first.seeds, first.failed) == ("a", (0, 1), 1)
    assert dict(first.metrics) == pytest.approx({"accuracy": 0.8, "nll": 0.6})
    assert first.range == Interval(0.7, 0.9)
    assert first.seconds == 10.5
    assert second.range is None
    title, _, header, teacher, line_a, line_b, *_ = format_leaderboard(found).splitlines()
    assert title == "sweep of 4 students; metrics on validation"
    assert header.split() == ["parameters", "seeds", "accuracy", "lowest", "to", "highest", "nll", "seconds"]
    assert teacher.split() == ["teacher", "95.0%", "0.200"]
    assert line_a.split() == ["*", "a", "2.0M", "2", "of", "3", "80.0%", "70.0%", "to", "90.0%", "0.600", "10"]
    assert line_b.split() == ["b", "2.0M", "1", "75.0%", "0.500", "10"]
    assert "best: a, in runs/a-seed0, runs/a-seed1 of out" in format_leaderboard(found)


def test_a_metric_that_some_run_lacks_is_not_chosen_by():
    runs = [
        made_up("a", 0, {"accuracy": 0.7, "agreement": 0.5}),
        made_up("b", 0, {"agreement": 0.6}),  # no labels in its cache's split
    ]
    found = ranked("sequence-classification", runs)
    assert (found.chosen_by, found.best) == ("agreement", "b")
