"""Two gloo processes train a student with another tokenizer to the same losses as one process."""

from __future__ import annotations

import json

import pytest

from pipeline.capture.run import run as capture
from tests.cross_tokenizer.test_training import byte_level, own_cache_directory, student
from tests.support.captures import config
from tests.support.processes import python, ranks

__all__ = ["config", "own_cache_directory"]

SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from pipeline.cli import main
main(sys.argv[1:])
"""


@pytest.mark.full
@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path, config):
    """Each rank aligns a part of the rows and reads the part that the other rank has aligned.

    The ranks have different numbers of aligned positions.
    """
    capture(config("cache"))
    path = student(tmp_path, byte_level(290))
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def command(output: str, batch: int) -> list[str]:
        named = ["--cache", str(tmp_path / "cache"), "--student", str(path), "--output", str(tmp_path / output)]
        settings = tmp_path / f"{output}.yaml"
        settings.write_text("train-student:\n  training:\n    logging_steps: 1\n    use_cpu: true\n")
        rest = ["--max-steps", "5", "--batch-size", str(batch), "--learning-rate", "0.001", "--config", str(settings)]
        return [str(script), "train-student", *named, *rest]

    for done in ranks(2, *command("two", 4)):
        assert done.returncode == 0, done.stderr[-3000:]
    files = sorted((tmp_path / "xdg").rglob("*.parquet"))
    assert files
    done = python(*command("one", 8))
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted((tmp_path / "xdg").rglob("*.parquet")) == files
    logs = [json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("two", "one")]
    two, one = ([(e["loss"], e["hard_loss"], e["soft_loss"]) for e in log if "hard_loss" in e] for log in logs)
    assert len(one) == 5
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
