"""Sampling is unbiased: the set of u that keeps a class has the length of its probability."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.records import Sampled
from pipeline.softlabels import counter_uniforms, encode, narrow, sample_tail, target
from pipeline.softlabels.blocks import BLOCK, in_blocks
from pipeline.softlabels.sampling import round_unbiased

C = 12.0


def kept_classes(tail: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return which classes are kept, (N, V) bool."""
    kept = torch.zeros(tail.shape, dtype=torch.bool)
    blocks = in_blocks(torch.nn.functional.pad(tail, (0, -tail.shape[1] % BLOCK)))
    kept[sample_tail(blocks, blocks.double().sum(-1), torch.full((len(tail),), C, dtype=torch.float64), uniforms)] = (
        True
    )
    return kept


def tail_of(classes: int, spread: float, seed: int = 0) -> torch.Tensor:
    """Return a softmax with its top set to 0, (1, V) float64."""
    logits = torch.randn(1, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * spread
    q = torch.softmax(logits, -1)
    return q.masked_fill(q >= 1 / C, 0.0)


@pytest.mark.parametrize("classes", [7, 64, 401])
@pytest.mark.parametrize("spread", [0.3, 3.0, 9.0])
def test_each_class_has_an_interval_of_u_as_long_as_its_probability(classes, spread):
    """Class i is kept for u in the fractional parts of (C_(i-1), C_i].

    Probes both sides of both ends for every class, the rarest included.
    """
    tail = tail_of(classes, spread)
    steps = (tail * C)[0]
    ends = steps.cumsum(0)
    for i in range(classes):
        length = float(steps[i])
        low, high = float(ends[i] - steps[i]), float(ends[i])
        if length == 0:
            probes = [0.0, 0.25, 0.5, 0.75, high % 1.0]
            expected = [False] * 5
        else:
            inside = [low + length * share for share in (0.01, 0.5, 0.99)]
            beyond = [low - (1 - length) * share for share in (0.01, 0.5, 0.99)]
            probes, expected = inside + beyond, [True] * 3 + [False] * 3
        if 0 < length < 1e-12:  # the ends are equal in float64
            continue
        uniforms = torch.tensor([probe % 1.0 for probe in probes], dtype=torch.float64)
        kept = kept_classes(tail.expand(len(probes), -1), uniforms)[:, i]
        assert kept.tolist() == expected, (i, length)


def test_number_kept_is_the_expected_number_rounded():
    tail = tail_of(401, 1.0).expand(500, -1)
    kept = kept_classes(tail, torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).sum(-1)
    expected = float((tail[0] * C).sum())
    assert set(kept.tolist()) <= {int(np.floor(expected)), int(np.ceil(expected))}


@pytest.mark.parametrize("stored", [False, True])
def test_the_mean_over_seeds_is_the_teacher(stored):
    """Each class of q > 1e-3 is within its confidence interval (99.9% for all together)."""
    logits = torch.randn(1, 150, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 2
    q = torch.softmax(logits, -1)[0]
    trials = 4000
    uniforms = torch.from_numpy(np.random.default_rng(0).random(trials))
    soft = encode(logits.expand(trials, -1), Sampled(C), uniforms=uniforms)
    goal = target(narrow(soft, uniforms) if stored else soft, 1.0)
    mean = torch.zeros(150, dtype=torch.float64).index_add(0, goal.ids, goal.weights.double()) / trials
    checked = (q > 1e-3).nonzero().squeeze(-1)
    z = stats.norm.ppf(1 - 0.001 / 2 / len(checked))
    for i in checked.tolist():
        share = min(1.0, float(q[i]) * C)
        error = np.sqrt(share * (1 - share) / trials) / C
        if stored and share == 1.0:  # rounded to a step: a variance of f (1 - f) steps^-2
            rest = float(q[i]) * Sampled(C).steps % 1.0
            error = np.sqrt(rest * (1 - rest) / trials) / Sampled(C).steps
        assert abs(float(mean[i] - q[i])) <= z * error + 1e-6, i


def test_uniforms_depend_on_where_a_position_stands_and_on_nothing_else():
    one = counter_uniforms(0, "train", 5, 0, np.arange(100))
    assert torch.equal(one[[3, 50]], counter_uniforms(0, "train", 5, 0, np.array([3, 50])))
    for other in [(1, "train", 5, 0), (0, "test", 5, 0), (0, "train", 6, 0), (0, "train", 5, 1)]:
        assert not torch.isclose(one, counter_uniforms(*other, np.arange(100))).any()


def test_uniforms_are_uniform():
    values = torch.cat([counter_uniforms(0, "train", row, 0, np.arange(50)) for row in range(200)]).numpy()
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    first = values.reshape(200, 50)
    assert abs(np.corrcoef(first[:, :-1].ravel(), first[:, 1:].ravel())[0, 1]) < 4 / np.sqrt(200 * 49)


def test_rounding_is_exact_in_expectation_for_every_value():
    """Rounding yields the floor, or the ceiling for a share of u equal to the fractional part."""
    values = torch.tensor([0.0, 0.25, 1.0, 2.75, 3.5, 0.1, 7.9], dtype=torch.float64)
    owner = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    rounded = torch.stack([round_unbiased(values, owner, torch.stack([u, u])) for u in grid]).double()
    torch.testing.assert_close(rounded.mean(0), values, atol=1e-3, rtol=0)
    assert ((rounded - values).abs() < 1).all()
    for n, total in ((0, 4.0), (1, 11.5)):
        assert ((rounded[:, owner == n].sum(1) - total).abs() < 1).all()


def test_what_rounding_takes_from_a_blocks_sum_falls_on_all_its_classes_in_proportion():
    """The block's sum is off by more than the weight of the rare class at its end."""
    tail = torch.zeros(1, 1, 64, dtype=torch.float64)
    tail[0, 0, :62] = 1 / C / 62 * 0.9
    tail[0, 0, 63] = 1e-9
    off = 1 + 1e-6
    sums = tail.sum(-1) * off
    low, length = float(tail[0, 0, :63].sum()) * C * off, 1e-9 * C * off
    shares = (-50.0, -0.5, 0.1, 0.5, 0.9)
    uniforms = torch.tensor([low + length * share for share in shares], dtype=torch.float64)
    position, ids = sample_tail(
        tail.expand(5, -1, -1), sums.expand(5, -1), torch.full((5,), C, dtype=torch.float64), uniforms
    )
    assert position[ids == 63].tolist() == [2, 3, 4]
