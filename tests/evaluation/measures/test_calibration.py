"""Calibration compared with scikit-learn; temperature scaling compared with direct minimisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from pipeline.evaluation.basis import Basis
from pipeline.evaluation.measures import calibration
from pipeline.evaluation.measures.calibration import (
    best_temperature,
    fit_temperatures,
    halves,
    pooled,
    reliability,
    scaled_losses,
)
from pipeline.evaluation.measures.observation import brier_scores
from pipeline.records import Full, Ragged, RowBlock
from pipeline.tasks import get_task


def logits_and_labels(count: int = 400, classes: int = 5, temperature: float = 1.0, seed: int = 0):
    """Logits z * temperature, and labels drawn from softmax(z): over-confident if it exceeds 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator)
    labels = torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)[:, 0]
    return temperature * logits, labels


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.7, 6.0])
@pytest.mark.parametrize("classes", [2, 37])
def test_the_temperature_is_the_minimum(temperature, classes):
    logits, labels = logits_and_labels(classes=classes, temperature=temperature)

    def loss(log_t: float) -> float:
        loss = torch.nn.functional.cross_entropy(logits.double() / np.exp(log_t), labels, reduction="sum")
        return float(loss) + log_t**2 / 2

    exact = np.exp(minimize_scalar(loss, bounds=(np.log(0.1), np.log(10)), method="bounded").x)
    assert best_temperature(scaled_losses(logits, labels).sum(0)) == pytest.approx(exact, rel=1e-3)


def test_losses_on_the_grid(monkeypatch):
    logits, labels = logits_and_labels(9)
    labels[3] = -100
    found = scaled_losses(logits, labels)
    monkeypatch.setattr(calibration, "_CHUNK", 11)
    assert np.allclose(scaled_losses(logits, labels), found)
    for g, temperature in enumerate(calibration.GRID):
        exact = torch.nn.functional.cross_entropy(logits / temperature, labels, ignore_index=-100, reduction="none")
        assert np.allclose(found[:, g], exact.numpy(), atol=1e-5)


def test_nothing_to_fit_on_leaves_the_model_as_it_is():
    assert best_temperature(np.zeros(len(calibration.GRID))) == pytest.approx(1, abs=1e-4)
    logits = torch.tensor([[9.0, 0.0]] * 15)  # all right: the loss alone would give the smallest T
    assert best_temperature(scaled_losses(logits, torch.zeros(15, dtype=torch.int64)).sum(0)) > 0.9
    assert best_temperature(np.full(len(calibration.GRID), np.nan)) == 1


def test_reliability_is_scikit_learns():
    rng = np.random.default_rng(0)
    confidence = rng.random(500)
    right = rng.random(500) < confidence
    accuracy, mean = calibration_curve(right, confidence, n_bins=15)
    bins = reliability(confidence, right)
    assert np.allclose([item.accuracy for item in bins], accuracy)
    assert np.allclose([item.confidence for item in bins], mean)
    assert sum(item.count for item in bins) == 500
    assert reliability(np.array([1.0, 1.0]), np.array([True, False]))[0].accuracy == 0.5
    assert reliability(np.array([0.5, np.nan]), np.array([True, False])) == ()


def test_pooled_seeds_are_one_diagram():
    rng = np.random.default_rng(0)
    confidence, right = rng.random(300), rng.random(300) < 0.5
    whole = reliability(confidence, right)
    parts = pooled([reliability(confidence[i::3], right[i::3]) for i in range(3)])
    assert [item.count for item in parts] == [item.count for item in whole]
    assert np.allclose([item.accuracy for item in parts], [item.accuracy for item in whole])
    assert pooled([whole, ()]) == ()


def test_brier_is_scikit_learns():
    logits, labels = logits_and_labels()
    p = torch.softmax(logits.double(), -1)
    expected = brier_score_loss(labels.numpy(), p.numpy(), labels=range(5), scale_by_half=False)
    assert brier_scores(p, labels).mean() == pytest.approx(expected)
    assert np.isnan(brier_scores(p[:1], torch.tensor([-100]))).all()


class FakeCache:
    """The parts of a cache that the fit reads: the contract and the rows' source numbers."""

    class manifest:  # noqa: N801
        class contract:  # noqa: N801
            task = "sequence-classification"
            num_classes = 5
            label_names = None
            columns = ("label",)

    def dataset(self, _split):
        class Rows:
            def column(self, _name):
                return np.arange(200)

        return Rows()


def fake_pass(logits, labels):
    """A replacement of `logits_by_batch` that yields batches of 50 rows."""

    def go(*_args):
        for start in range(0, 200, 50):
            one_each = Ragged.of(np.zeros(250), np.full(50, 5))
            rows = RowBlock(Full(), 5, {"logits": one_each}, {"source_row": np.arange(start, start + 50)}, {})
            yield rows, type("B", (), {"labels": labels[start : start + 50]}), logits[start : start + 50]

    return go


def test_a_row_is_never_scaled_by_its_own_label(monkeypatch):
    task = get_task("sequence-classification")
    logits, labels = logits_and_labels(200, temperature=3.0)
    monkeypatch.setattr(calibration, "logits_by_batch", fake_pass(logits, labels))
    before = fit_temperatures(FakeCache(), Basis(task), None, "s", "test", None, 50)
    assert before.main_metric is None
    first, second = halves(np.arange(200)) == 0, halves(np.arange(200)) == 1
    assert 80 <= first.sum() <= 120
    assert abs(halves(np.arange(0, 2000, 2)).mean() - 0.5) < 0.05  # also for every second row
    other = labels.clone()
    other[first] = (other[first] + 1) % 5  # the first half's temperature must not use its labels
    monkeypatch.setattr(calibration, "logits_by_batch", fake_pass(logits, other))
    after = fit_temperatures(FakeCache(), Basis(task), None, "s", "test", None, 50)
    assert (after.row_temperatures[first] == before.row_temperatures[first]).all()
    assert (after.row_temperatures[second] != before.row_temperatures[second]).all()


def test_another_split_gives_one_temperature_and_the_metric_there(monkeypatch):
    task = get_task("sequence-classification")
    logits, labels = logits_and_labels(200, temperature=3.0)
    monkeypatch.setattr(calibration, "logits_by_batch", fake_pass(logits, labels))
    found = fit_temperatures(FakeCache(), Basis(task), None, "s", "test", "validation", 50)
    assert len(set(found.row_temperatures)) == 1
    assert found.row_temperatures[0] == pytest.approx(best_temperature(scaled_losses(logits, labels).sum(0)))
    assert found.main_metric == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
