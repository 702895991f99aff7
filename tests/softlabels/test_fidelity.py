"""Noise, bias and angle against dense float64, and as statistics."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.records import Full, Sampled, Target, TopK
from pipeline.softlabels import encode, target
from pipeline.softlabels.fidelity import FidelityMeter, Projection, Reference, spread

N, V, H = 400, 157, 12


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(0)) * 2


@pytest.fixture(scope="module")
def matrix() -> torch.Tensor:
    return torch.randn(V, H, generator=torch.Generator().manual_seed(1))


def measured(logits, matrix, encoding, *, tail="ghost", seed=0):
    soft = encode(logits, encoding, generator=torch.Generator().manual_seed(seed))
    meter = FidelityMeter()
    for start in range(0, len(logits), 150):  # in parts, like batches
        part = slice(start, start + 150)
        piece = encode(
            logits[part],
            encoding,
            uniforms=torch.rand(len(logits), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))[part],
        )
        meter.add(Reference.of(logits[part], Projection.of(matrix)), target(piece, 1.0, tail=tail), piece)
    result = meter.result()
    assert result is not None
    return result, soft


def test_full_is_the_teacher(logits, matrix):
    found, _ = measured(logits, matrix, Full())
    assert found.positions == N
    assert found.kept == V
    assert found.noise == pytest.approx(0, abs=1e-9)
    assert found.kl == pytest.approx(0, abs=1e-5)
    assert found.angle == pytest.approx(0, abs=0.05)
    assert found.norm_ratio == pytest.approx(1, abs=1e-5)
    assert found.kept_mass == pytest.approx({"1": 1.0, "2": 1.0, "4": 1.0}, abs=1e-5)


@pytest.mark.parametrize("tail", ["ghost", "renormalize", "ignore"])
def test_top_k_against_dense_float64(logits, matrix, tail):
    found, _ = measured(logits, matrix, TopK(9), tail=tail)
    q, w = torch.softmax(logits.double(), -1), matrix.double()
    kept = torch.zeros_like(q, dtype=torch.bool).scatter(1, q.topk(9).indices, True)
    goal = q.masked_fill(~kept, 0.0)
    parts = []
    for start in range(0, N, 150):
        parts.append(Reference.of(logits[start : start + 150], Projection.of(matrix)).student)
    p = torch.cat(parts).double()
    if tail == "renormalize":
        goal = goal / goal.sum(-1, keepdim=True)
    if tail == "ghost":
        outside = p.masked_fill(kept, 0.0)
        goal = goal + (1 - goal.sum(-1, keepdim=True)) * outside / outside.sum(-1, keepdim=True)
    error = (goal - q) @ w
    assert found.noise == pytest.approx(float(error.square().sum(-1).mean()), rel=1e-3)
    total = error.sum(0).square().sum() - error.square().sum()
    assert found.bias == pytest.approx(max(float(total) / (N * (N - 1)), 0), rel=1e-2, abs=1e-6)
    ours, theirs = (p - goal) @ w, (p - q) @ w
    cosine = float((ours * theirs).sum() / ours.norm() / theirs.norm())
    assert found.angle == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-3, abs=0.05)
    assert found.norm_ratio == pytest.approx(float(ours.norm() / theirs.norm()), rel=1e-4)
    if tail == "ghost":
        even = torch.where(kept, q, (1 - q.masked_fill(~kept, 0).sum(-1, keepdim=True)) / (V - 9))
        assert found.kl == pytest.approx(float((q * (q / even).log()).sum(-1).mean()), rel=1e-3)
    else:
        assert found.kl is None


def test_sampled_has_no_bias_and_less_noise_the_more_it_keeps(logits, matrix):
    noises = []
    for c in (6.0, 12.0, 40.0):
        found, _ = measured(logits, matrix, Sampled(c))
        # The estimate of a squared mean that is 0 has a standard deviation of about noise * sqrt(2
        # / H) / N.
        assert found.bias < 4 * found.noise * math.sqrt(2 / H) / N
        assert found.kl is None
        noises.append(found.noise)
    assert noises[0] > noises[1] > noises[2]


def test_one_drawn_label_has_the_noise_that_shares_are_taken_of(logits, matrix):
    """The mean noise share over draws of one label is 1, within 4 of its standard errors."""
    generator = torch.Generator().manual_seed(5)
    q = torch.softmax(logits, -1)
    meter = FidelityMeter()
    reference = Reference.of(logits, Projection.of(matrix))
    offsets = torch.arange(N + 1)
    shares = []
    for _ in range(40):
        meter = FidelityMeter()
        ids = torch.multinomial(q, 1, generator=generator).squeeze(-1)
        meter.add(reference, Target(V, offsets, ids, torch.ones(N), None, torch.zeros(N)))
        shares.append(meter.result().noise_share)  # type: ignore[union-attr]
    shares = torch.tensor(shares)
    assert abs(float(shares.mean()) - 1) < 4 * float(shares.std()) / math.sqrt(40)


def test_the_mean_square_over_seeds_is_what_one_seed_estimates(logits, matrix):
    noises = torch.tensor([measured(logits, matrix, Sampled(12.0), seed=seed)[0].noise for seed in range(12)])
    assert float(noises.std() / noises.mean()) < 0.15


def test_no_position_no_result():
    assert FidelityMeter().result() is None


def test_spread_is_even_and_bounded():
    for count, most in ((0, 5), (3, 5), (5, 5), (6, 5), (1000, 64)):
        chosen = list(spread(count, most))
        assert len(chosen) <= most
        assert len(chosen) == min(count, most) or count > most
        assert all(0 <= i < count for i in chosen)
