"""Latency, memory, size and energy of models, measured on tiny ones, and derived numbers."""

from __future__ import annotations

import pytest

import pipeline as softlabel
from pipeline.errors import ModelError
from pipeline.evaluation.measures import cost, cost_worker
from pipeline.evaluation.measures.cost import Candidate, disk_bytes, measure_costs, spread
from pipeline.evaluation.measures.cost_worker import Turn
from pipeline.evaluation.report.figures import pareto_front
from tests.support.classifier import classifier


@pytest.mark.full
@pytest.mark.slow
def test_each_model_in_a_process_of_its_own(tmp_path, bert_tokenizer, topics, save_teacher):
    big = classifier(bert_tokenizer, hidden_size=256, intermediate_size=1024)
    path = save_teacher(big, bert_tokenizer)
    small = save_teacher(classifier(bert_tokenizer), bert_tokenizer, "small")
    cache = softlabel.cache_logits(str(path), topics, tmp_path / "c", task="sequence-classification")
    models = [Candidate(n, str(p), str(cache.root), 0) for n, p in (("teacher", path), ("small", small))]
    costs, machine = measure_costs(models, "test", rounds=2, batch_rows=16, threads=1, watts=10.0)
    teacher, student = costs
    assert teacher.num_parameters == sum(p.numel() for p in big.parameters())
    assert student.latency.low <= student.latency.median <= student.latency.high
    assert teacher.latency.median > 0
    # Two rounds on a shared machine cannot show which model is faster; `make report` measures that.
    for ratio in (student.speedup, student.speedup_batched):
        assert 0 < ratio.low <= ratio.median <= ratio.high
    assert (teacher.speedup.low, teacher.speedup.high) == (1, 1)
    assert student.throughput.median > 0 < teacher.throughput.median
    assert 0 < student.peak_bytes < 400e6
    assert student.joules_per_thousand > 0 < teacher.joules_per_thousand
    assert (machine.threads, machine.rounds, machine.batch_rows, machine.device) == (1, 2, 16, "cpu")
    assert ("an estimate" in machine.energy) == (not cost_worker._meter())
    assert student.disk_bytes == (small / "model.safetensors").stat().st_size


@pytest.mark.full
def test_a_model_that_cannot_be_loaded_is_named(tmp_path, bert_tokenizer, topics, save_teacher):
    path = save_teacher(classifier(bert_tokenizer), bert_tokenizer)
    cache = softlabel.cache_logits(str(path), topics, tmp_path / "c", task="sequence-classification")
    (path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"measures broken has ended: .*--rounds 0"):
        measure_costs(
            [Candidate("broken", str(path), str(cache.root), 0)], "test", rounds=1, batch_rows=8, threads=1, watts=1.0
        )


def test_no_rounds_measure_sizes_alone(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 70)
    (tmp_path / "training_args.bin").write_bytes(b"x")
    costs, machine = measure_costs(
        [Candidate("s", str(tmp_path), "", 7)], "test", rounds=0, batch_rows=8, threads=None, watts=1.0
    )
    assert machine is None
    assert (costs[0].num_parameters, costs[0].disk_bytes, costs[0].latency) == (7, 70, None)
    assert disk_bytes("org/name") is None


def test_energy_is_metered_or_estimated():
    turns = [Turn((0.1,), 10, 2.0, 30.0, None), Turn((0.1,), 10, 1.0, 10.0, None)]
    assert cost._joules(turns, 5.0, metered=False) == pytest.approx(1000 * 5 * 3 / 20)
    assert cost._joules(turns, 5.0, metered=True) == pytest.approx(1000 * 40 / 20)
    # The energy counter wraps around at its limit.
    assert cost_worker._spent({"p": (90, 99)}, {"p": (10, 99)}) == pytest.approx(20e-6)
    assert cost_worker._spent({}, {}) is None


def test_spread_is_the_quartiles():
    found = spread([1, 2, 3, 4, 5])
    assert (found.low, found.median, found.high) == (2, 3, 4)


def test_the_pareto_front():
    points = [(10.0, 0.9), (5.0, 0.8), (7.0, 0.7), (5.0, 0.85), (20.0, 0.9)]
    assert pareto_front(points, higher=True) == [(5.0, 0.85), (10.0, 0.9)]
    assert pareto_front([(1.0, 3.0), (2.0, 2.0), (3.0, 2.5)], higher=False) == [(1.0, 3.0), (2.0, 2.0)]
