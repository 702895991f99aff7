"""Coverage of intervals in simulations; bootstrap and tests compared with other implementations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from pipeline.evaluation.measures.statistics import (
    holm,
    mcnemar,
    measured,
    paired_permutation,
    paired_t,
    percentiles,
    proportion,
    resampled_means,
)


def within(covered: int, trials: int, low: float, high: float) -> bool:
    """Whether the count is within the 99.9% range for a probability between `low` and `high`."""
    return stats.binom.ppf(0.0005, trials, low) <= covered <= stats.binom.ppf(0.9995, trials, high)


def test_the_bootstrap_is_scipys():
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 9, 150).astype(float)
    scores = rng.random((2, 150)) * weights
    ours = resampled_means(scores, np.tile(weights, (2, 1)), resamples=4000, seed=1)
    assert ours.shape == (4000, 2)
    theirs = stats.bootstrap(
        (scores[0], scores[1], weights),
        lambda a, b, w, axis: a.sum(axis=axis) / w.sum(axis=axis) - b.sum(axis=axis) / w.sum(axis=axis),
        n_resamples=4000,
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(2),
    )
    found = percentiles(ours[:, 0] - ours[:, 1])
    spread = theirs.standard_error
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.15 * spread)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.15 * spread)


def test_models_share_their_resamples_and_chunks_do_not_matter(monkeypatch):
    rng = np.random.default_rng(0)
    scores, weights = rng.random((3, 40)), np.ones((3, 40))
    scores[1] = scores[0]
    whole = resampled_means(scores, weights, resamples=200, seed=3)
    assert (whole[:, 0] == whole[:, 1]).all()
    monkeypatch.setattr("pipeline.evaluation.measures.statistics._CHUNK", 40 * 7)
    parts = resampled_means(scores, weights, resamples=200, seed=3)
    assert np.allclose(whole, parts)


def test_rows_that_do_not_count_change_nothing():
    scores, weights = np.array([[1.0, 0.0, 1.0, 5.0]]), np.array([[1.0, 1.0, 1.0, 0.0]])
    assert np.array_equal(
        resampled_means(scores, weights, resamples=50), resampled_means(scores[:, :3], weights[:, :3], resamples=50)
    )
    assert np.isnan(resampled_means(scores, np.zeros((1, 4)), resamples=5)).all()


def test_coverage_over_rows_whose_positions_depend_on_each_other():
    """Resampling rows gives 95% coverage; intervals over positions cover far less often."""
    rng = np.random.default_rng(0)
    trials, rows, positions = 400, 120, 8
    by_row = by_position = 0
    for trial in range(trials):
        difficulty = rng.normal(size=(rows, 1))
        right = rng.random((rows, positions)) < stats.norm.cdf(0.5 + difficulty)  # P = cdf(0.5 / sqrt 2)
        truth = stats.norm.cdf(0.5 / math.sqrt(2))
        sums, weights = right.sum(1, keepdims=True).T.astype(float), np.full((1, rows), float(positions))
        found = percentiles(resampled_means(sums, weights, resamples=400, seed=trial)[:, 0])
        by_row += found.low <= truth <= found.high
        mean = right.mean()
        half = 1.96 * math.sqrt(mean * (1 - mean) / right.size)
        by_position += mean - half <= truth <= mean + half
    assert within(by_row, trials, 0.93, 0.955)
    assert by_position < 0.85 * trials


def test_coverage_of_paired_ratios():
    """Covers retention, the ratio of student to teacher on the same rows."""
    rng = np.random.default_rng(1)
    trials, rows, covered = 400, 200, 0
    for trial in range(trials):
        hard = rng.normal(size=rows)
        teacher, student = (stats.norm.cdf(shift - hard) > rng.random(rows) for shift in (1.5, 1.0))
        truth = stats.norm.cdf(1.0 / math.sqrt(2)) / stats.norm.cdf(1.5 / math.sqrt(2))
        means = resampled_means(np.array([student, teacher], float), np.ones((2, rows)), resamples=400, seed=trial)
        found = percentiles(means[:, 0] / means[:, 1])
        covered += found.low <= truth <= found.high
    assert within(covered, trials, 0.93, 0.96)


@pytest.mark.parametrize("seeds", [3, 5])
def test_coverage_over_rows_and_seeds(seeds):
    """Intervals over rows alone or seeds alone are too narrow; those over both are not."""
    rng = np.random.default_rng(seeds)
    trials, rows = 400, 100
    covered = dict.fromkeys(("rows", "seeds", "both"), 0)
    for trial in range(trials):
        scores = 1 + 0.1 * rng.normal(size=(seeds, 1)) + rng.normal(size=(1, rows)) + rng.normal(size=(seeds, rows))
        resampled = resampled_means(scores.mean(0, keepdims=True), np.ones((1, rows)), resamples=400, seed=trial)
        found = measured(scores.mean(), resampled[:, 0], scores.mean(1))
        for name in covered:
            interval = getattr(found, name)
            covered[name] += interval.low <= 1 <= interval.high
    assert within(covered["both"], trials, 0.94, 0.99)
    assert covered["rows"] < 0.93 * trials
    assert covered["seeds"] < 0.93 * trials


def test_one_seed_says_nothing_of_seeds():
    found = measured(0.5, np.array([0.4, 0.5, 0.6]), [0.5])
    assert found.seeds is None
    assert found.both is None
    assert found.interval == found.rows
    assert measured(0.5, np.array([0.4, np.nan]), [0.4, 0.6]).interval is None


def test_seeds_that_agree_leave_the_rows_variance():
    resampled = np.random.default_rng(0).normal(size=5000)
    found = measured(0.0, resampled, [0.0, 0.0, 0.0])
    assert found.both.high == pytest.approx(1.96 * resampled.std(), rel=1e-2)
    assert measured(1.0, np.ones(9), [1.0, 1.0]).both.low == 1


def test_mcnemar_against_the_binomial_sum():
    first = np.array([1] * 9 + [0] * 3 + [1] * 50 + [0] * 5, dtype=bool)
    second = np.array([0] * 9 + [1] * 3 + [1] * 50 + [0] * 5, dtype=bool)
    assert mcnemar(first, second) == pytest.approx(2 * sum(math.comb(12, k) for k in range(4)) / 2**12)
    assert mcnemar(first, first) == 1
    assert mcnemar(first, second) == mcnemar(second, first)


def test_sign_flips_against_all_of_them():
    differences = np.array([0.3, -0.1, 0.8, 0.5, 0.0, 0.4, -0.2, 0.9])
    some = differences[differences != 0]
    sums = [abs(float(np.dot(signs, some))) for signs in itertools.product((-1, 1), repeat=len(some))]
    exact = np.mean([total >= abs(some.sum()) - 1e-9 for total in sums])
    assert paired_permutation(differences) == pytest.approx(exact)
    assert paired_permutation(np.zeros(5)) == 1
    assert math.isnan(paired_permutation(np.array([1.0, np.nan])))


def test_sign_flips_reject_as_often_as_they_say():
    rng = np.random.default_rng(0)
    trials = 300
    rejected = sum(paired_permutation(rng.normal(size=30), resamples=199, seed=i) <= 0.05 for i in range(trials))
    assert within(rejected, trials, 0.05, 0.05)
    assert paired_permutation(rng.normal(size=60) + 1) < 0.001


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = holm([0.5, math.nan, 0.9])
    assert adjusted[0] == 1
    assert math.isnan(adjusted[1])
    assert holm([]) == []


def test_paired_t_is_scipys():
    a, b = np.array([0.91, 0.92, 0.95]), np.array([0.88, 0.90, 0.89])
    assert paired_t(a - b) == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert paired_t(a[:1]) is None
    assert paired_t(np.array([0.5, 0.5])) is None


def test_all_rows_right_is_no_certainty():
    found = proportion(30, 30)
    assert found.high == 1
    assert found.low == pytest.approx(0.025 ** (1 / 30))


def test_the_interval_over_both_adds_the_variances():
    resampled, seeds = np.random.default_rng(0).normal(size=3000), [0.0, 1.0, 3.5]
    found = measured(1.5, resampled, seeds).both
    of_rows, of_seeds = resampled.var(ddof=1), np.var(seeds, ddof=1) / 3
    freedom = (of_rows + of_seeds) ** 2 / (of_seeds**2 / 2)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(of_rows + of_seeds)
    assert (found.low, found.high) == pytest.approx((1.5 - half, 1.5 + half))


@pytest.mark.parametrize("differences", [[0.0, 0.0], [0.0, -0.5, 0.0], [0.25]])
def test_one_difference_alone_is_no_evidence(differences):
    assert paired_permutation(np.array(differences)) == 1.0
