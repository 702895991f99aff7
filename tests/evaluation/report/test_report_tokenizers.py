"""The report on a student with another tokenizer: bits per byte instead of per-token metrics."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from pipeline.cache.format.manifest import dump
from pipeline.capture.run import run as capture
from pipeline.config import ReportConfig
from pipeline.cross_tokenizer.opening import cache_for
from pipeline.errors import MisuseError
from pipeline.evaluation import evaluate
from pipeline.evaluation.measures.observation import observe_teacher
from pipeline.evaluation.report.report import report
from pipeline.outlines.checks import outline_report
from pipeline.tasks import get_task
from tests.conftest import tiny_model
from tests.cross_tokenizer.test_training import byte_level, own_cache_directory, student
from tests.support.captures import config
from tests.support.profile import plain_pictures

__all__ = ["config", "own_cache_directory", "plain_pictures"]


KNOBS = {"top-k": {"top_k": 8}, "sampled": {"sample_size": 8.0}}


@pytest.fixture
def models(tmp_path, config, save_teacher):
    """A function that returns a cache and two students: with another tokenizer, with the same."""

    def make(encoding):
        cached = capture(config("cache", **KNOBS[encoding]))
        same = save_teacher(tiny_model("llama", len(cached.tokenizer), seed=4, spread=2.0), cached.tokenizer, "same")
        return cached, student(tmp_path, byte_level(290)), same

    return make


def configured(tmp_path, **settings) -> ReportConfig:
    fields = {"rounds": 0, "resamples": 200, "examples": 2, "overwrite": True, **settings}
    return ReportConfig(cache=(str(tmp_path / "cache"),), output=str(tmp_path / "report"), **fields)


@pytest.mark.usefixtures("plain_pictures")
@pytest.mark.parametrize("encoding", list(KNOBS))
def test_models_are_compared_by_the_byte(tmp_path, models, encoding):
    cached, other, same = models(encoding)
    found = report(configured(tmp_path, student=(f"other={other}",), control=(f"same={same}",)))
    assert (found.main_metric, found.higher_is_better) == ("bits_per_byte", False)
    known = evaluate(cached, {"other": str(other), "same": str(same)}, split="test")
    lines = {line.name: line for line in found.quality}
    for line in known.students:
        ours = lines[line.name]
        assert ours.metrics["bits_per_byte"].value == pytest.approx(line.metrics["bits_per_byte"], rel=1e-9)
        assert ours.retention.value == pytest.approx(line.retention, rel=1e-9)
        assert ours.metrics["bits_per_byte"].interval.low < ours.metrics["bits_per_byte"].value
    assert found.teachers[0].metrics["bits_per_byte"].value == pytest.approx(known.teacher.metrics["bits_per_byte"])
    close = {line.name: line for line in found.closeness}
    for line in known.students:
        assert close[line.name].agreement.value == pytest.approx(line.agreement)
        assert close[line.name].kl.value == pytest.approx(line.kl, rel=1e-6)
    assert math.isnan(close["other"].mended)
    assert (close["other"].js is None) == (encoding == "sampled")
    # Per-token metrics are omitted for the other tokenizer and kept for the teacher's.
    for name in ("other", "other, scaled"):
        assert set(lines[name].metrics) == {"bits_per_byte", "ece"}
    assert {"loss", "perplexity", "accuracy"} < set(lines["same"].metrics)
    assert {item.metric for item in found.comparisons} == {"bits_per_byte"}
    tests = {(item.first, item.second): item for item in found.comparisons}
    assert set(tests) == {("other", "teacher"), ("other", "same"), ("other", "same, scaled")}
    assert all(item.test == "sign flips over rows" for item in tests.values())
    assert {share.metric for share in found.gap_shares} == {"bits_per_byte"}
    nll = {line.name: line.nll for line in found.calibrations}
    assert nll["other"] is nll["other, scaled"] is None
    assert nll["same"] is not None
    assert lines["other, scaled"].metrics["bits_per_byte"].value != lines["other"].metrics["bits_per_byte"].value
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Another tokenizer than the teacher's: other." in text
    assert "Left out for other" in text
    assert "its own tokenizer of 290 tokens" in text
    assert "nan" not in text
    assert (tmp_path / "report" / "report.json").read_text() == dump(found)


@pytest.mark.usefixtures("plain_pictures")
def test_slices_and_shares_are_of_the_aligned_positions(tmp_path, models):
    cached, other, _ = models("top-k")
    found = report(configured(tmp_path, student=(f"other={other}",), examples=1))
    view = cache_for(cached, str(other), "test")
    teacher = observe_teacher(cached, get_task("causal-lm"), "test")
    # Computed directly: the teacher's positions that are aligned with one of the student's.
    met = np.zeros(len(teacher.predictions.labels), dtype=bool)
    before = 0
    for original, block in zip(cached.dataset("test").blocks(4), view.dataset("test").blocks(4), strict=True):
        where = block.lists["teacher_position"]
        starts = np.repeat(original.lists["top_count"].offsets[:-1], where.counts)
        aligned = where.values >= 0
        met[before + (where.values + starts)[aligned]] = True
        before += int(original.lists["top_count"].counts.sum())
    count = next(line for line in found.tokenizer_notes if line.startswith("other predicts"))
    assert f"{met.sum() / view_positions(view):.1%} of its positions are aligned" in count
    assert sum(item.positions for item in found.slices) == found.positions
    for item in found.slices:
        assert item.models[0].accuracy is item.models[0].loss is None
        assert 0 <= item.models[0].agreement <= 1
        assert item.models[0].kl > 0
    each = [item.models[0].kl for item in found.slices]
    assert min(each) <= found.closeness[0].kl.value <= max(each)
    example = found.examples[0]
    assert example.distance > 0
    assert example.answer


def view_positions(view) -> int:
    return sum(len(block.lists["teacher_position"].values) for block in view.dataset("test").blocks())


@pytest.mark.usefixtures("plain_pictures")
def test_rows_that_are_cut_have_bytes_of_their_own(tmp_path, config):
    capture(config("cache"))
    path = student(tmp_path, byte_level(290), max_position_embeddings=40)
    found = report(configured(tmp_path, student=(f"short={path}",)))
    known = evaluate(tmp_path / "cache", {"short": str(path)}, split="test").students[0]
    line = found.quality[0]
    assert line.metrics["bits_per_byte"].value == pytest.approx(known.metrics["bits_per_byte"], rel=1e-9)
    note = next(line for line in found.tokenizer_notes if line.startswith("short predicts"))
    ours, theirs = (int(part.split()[-1].replace(",", "")) for part in note.split(" bytes")[:2])
    assert ours < theirs
    assert found.comparisons[0].test == "sign flips over rows"
    assert not math.isnan(found.comparisons[0].p_value)


def test_seeds_of_one_student_have_one_tokenizer(tmp_path, models):
    _, other, same = models("top-k")
    with pytest.raises(MisuseError, match=r"--student s: .*have different tokenizers.*a NAME=DIR of its own"):
        report(configured(tmp_path, student=(f"s={other}", f"s={same}")))


def test_a_dry_run_loads_such_a_student(tmp_path, models):
    _, other, same = models("top-k")
    lines = dict(outline_report(configured(tmp_path, student=(f"other={other}", f"same={same}"))))
    assert "parameters" in lines["other"]
    assert not (tmp_path / "report").exists()


@pytest.mark.full
@pytest.mark.slow
def test_costs_are_of_rows_and_of_bytes(tmp_path, models):
    _, other, same = models("top-k")
    found = report(configured(tmp_path, student=(f"other={other}", f"same={same}"), rounds=1, threads=1))
    for cost in found.costs:
        assert cost.throughput.median > 0 < cost.peak_bytes
        assert cost.bytes_per_second.median / cost.throughput.median == pytest.approx(
            found.machine.bytes_per_row, rel=0.01
        )
    text = (tmp_path / "report" / "report.md").read_text()
    assert "KB of text a second" in text
    assert f"rows of {found.machine.bytes_per_row} bytes of text" in text
    again = json.loads((tmp_path / "report" / "report.json").read_text())
    assert again["machine"]["bytes_per_row"] == found.machine.bytes_per_row
