"""The interpolated mass outside the top between the stored temperatures.

It is within the stated bound and close to the exact value.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.records import TopK, TopP
from pipeline.softlabels import encode, log_residual_bounds, target
from tests.support.profile import examples


def zipf(count: int, classes: int, seed: int) -> torch.Tensor:
    """Return logits that fall like a language model's: a few large ones and a long tail."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(classes, generator=generator) for _ in range(count)]).double() + 1
    return -1.3 * ranks.log() + torch.randn(count, classes, generator=generator, dtype=torch.float64) * 0.7


def truth(logits: torch.Tensor, soft, temperature: float) -> torch.Tensor:
    owner = torch.repeat_interleave(torch.arange(len(soft)), soft.top_offsets.diff())
    outside = logits.double().clone()
    outside[owner, soft.top_ids] = -torch.inf
    return torch.logsumexp(outside / temperature, -1) - torch.logsumexp(logits.double() / temperature, -1)


@settings(deadline=None, max_examples=examples(60, 600))
@given(
    st.sampled_from([TopK(3), TopK(20), TopK(8, (1.0, 4.0)), TopP(0.6), TopP(0.9, (0.5, 1.0, 1.5, 3.0))]),
    st.integers(0, 10_000),
    st.floats(0.0, 1.0),
    st.sampled_from([0.1, 1.0, 4.0]),
)
def test_the_truth_lies_within_the_bounds(encoding, seed, share, spread):
    logits = zipf(5, 301, seed) * spread
    soft = encode(logits, encoding)
    low, high = min(encoding.temperatures), max(encoding.temperatures)
    temperature = low + (high - low) * share
    below, above = log_residual_bounds(soft, temperature)
    expected = truth(logits, soft, temperature)
    assert (below <= expected + 1e-4).all()
    assert (expected <= above + 1e-4).all()
    found = target(soft, temperature).log_residual
    assert found is not None
    assert (found >= below - 1e-4).all()
    assert (found <= above + 1e-4).all()


@pytest.mark.parametrize(("temperature", "most"), [(1.25, 0.06), (1.5, 0.05), (3.0, 0.01), (3.5, 0.005)])
def test_the_mass_between_grid_points_is_near_the_truth(temperature, most):
    logits = zipf(200, 3000, 1)
    soft = encode(logits, TopK(50))
    found = target(soft, temperature).log_residual
    assert found is not None
    assert float((found.exp() - truth(logits, soft, temperature).exp()).abs().max()) < most


def test_a_target_between_grid_points_is_a_distribution():
    goal = target(encode(zipf(50, 300, 2), TopK(10)), 1.7)
    assert goal.log_residual is not None
    owner = torch.repeat_interleave(torch.arange(50), goal.offsets.diff())
    mass = torch.zeros(50).index_add(0, owner, goal.weights) + goal.log_residual.exp()
    torch.testing.assert_close(mass, torch.ones(50), atol=1e-5, rtol=0)


def test_nothing_outside_stays_nothing():
    soft = encode(zipf(4, 6, 3), TopK(6))
    assert target(soft, 1.7).log_residual.isneginf().all()  # type: ignore[union-attr]


def test_at_a_grid_point_the_bounds_are_the_value():
    soft = encode(zipf(4, 60, 3), TopK(6))
    low, high = log_residual_bounds(soft, 2.0)
    assert torch.equal(low, soft.log_residuals[:, 1])
    assert torch.equal(high, low)
