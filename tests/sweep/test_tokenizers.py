"""A sweep with one student whose tokenizer differs from the teacher's."""

from __future__ import annotations

import pytest

from pipeline.capture.run import run as capture
from pipeline.config import SweepConfig
from pipeline.evaluation import evaluate
from pipeline.sweep import format_leaderboard, report, run
from tests.conftest import tiny_model
from tests.cross_tokenizer.test_training import byte_level, own_cache_directory, student
from tests.support.captures import config
from tests.support.profile import plain_pictures

__all__ = ["config", "own_cache_directory", "plain_pictures"]


@pytest.mark.full
@pytest.mark.usefixtures("plain_pictures")
def test_students_of_two_tokenizers_are_ranked_by_the_byte(tmp_path, config, save_teacher):
    settings = config("cache")
    rows = tmp_path / "data" / "test.jsonl"
    (tmp_path / "data" / "validation.jsonl").write_text(rows.read_text())
    cached = capture(settings)
    other = student(tmp_path, byte_level(290))
    same = save_teacher(tiny_model("llama", len(cached.tokenizer), seed=4), cached.tokenizer, "same")
    sweep = SweepConfig(
        cache=(str(cached.root),),
        student=(f"other={other}", f"same={same}"),
        controls=False,
        max_steps=3,
        batch_size=8,
        learning_rate=1e-3,
        output=str(tmp_path / "sweep"),
    )
    found = run(sweep)
    assert not found.failed
    assert (found.chosen_by, found.higher_is_better) == ("bits_per_byte", False)
    values = [group.metrics["bits_per_byte"] for group in found.groups]
    assert values == sorted(values)
    made = {each.student: str(tmp_path / "sweep" / each.directory) for each in found.runs}
    lines = {line.name: line for line in evaluate(cached, made, split="validation").students}
    for each in found.runs:
        assert each.result.metrics["bits_per_byte"] == pytest.approx(
            lines[each.student].metrics["bits_per_byte"], rel=1e-4
        )
        assert (each.result.own_tokenizer is None) == (each.student == "same")
    text = format_leaderboard(found)
    header = next(line for line in text.splitlines() if "parameters" in line)
    assert "bits_per_byte" in header
    assert "nll" not in text
    assert "accuracy" not in header
    assert "by the lowest bits_per_byte, the mean over seeds; never on test" in text
    assert "another tokenizer than the teacher's: other;" in text
    assert "bits_per_byte" in report(sweep, found)
