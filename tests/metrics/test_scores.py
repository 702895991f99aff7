from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.retrieval import retrieval_normalized_dcg, retrieval_reciprocal_rank

from pipeline.metrics.scores import correlation_influence, ndcg, pearson, reciprocal_rank, spearman


def ranked(seed: int, graded: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Relevance, scores and list numbers of 40 interleaved lists of 1 to 30 rows; no score ties."""
    rng = np.random.default_rng(seed)
    lists = np.repeat(np.arange(40), rng.integers(1, 31, 40))
    order = rng.permutation(len(lists))
    relevance = rng.integers(0, 4 if graded else 2, len(lists)) * (rng.random(len(lists)) < 0.3)
    return relevance.astype(np.float64), rng.normal(size=len(lists)), lists[order]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("graded", [True, False])
def test_rankings_are_scored_as_by_torchmetrics(seed, graded):
    relevance, scores, lists = ranked(seed, graded)
    found, ranks = ndcg(relevance, scores, lists), reciprocal_rank(relevance, scores, lists)
    for number in range(40):
        of = lists == number
        if not (relevance[of] > 0).any():
            assert math.isnan(found[number])
            assert math.isnan(ranks[number])
            continue
        score, truth = torch.from_numpy(scores[of]), torch.from_numpy(relevance[of])
        assert found[number] == pytest.approx(float(retrieval_normalized_dcg(score, truth, top_k=10)), abs=1e-6)
        above = score - score.min() + 1  # torchmetrics ignores rows with scores of 0 or less
        assert ranks[number] == pytest.approx(float(retrieval_reciprocal_rank(above, truth > 0)), abs=1e-6)


def test_one_score_for_all_gains_nothing_by_the_order_of_the_data():
    """With equal scores, the relevant row is ranked last although it is first in the data."""
    relevance, lists = np.array([1.0, 0.0, 0.0, 0.0]), np.zeros(4, dtype=np.int64)
    assert reciprocal_rank(relevance, np.zeros(4), lists)[0] == 0.25
    assert ndcg(relevance, np.zeros(4), lists)[0] == pytest.approx(1 / math.log2(5))


def test_no_row_and_no_list():
    none = np.zeros(0)
    assert not len(ndcg(none, none, none.astype(np.int64)))
    assert not len(reciprocal_rank(none, none, none.astype(np.int64)))


def test_a_correlation_of_what_does_not_vary_is_not_known():
    assert math.isnan(pearson(np.ones(5), np.arange(5.0)))
    assert math.isnan(pearson(np.arange(1.0), np.arange(1.0)))
    assert math.isnan(spearman(np.arange(5.0), np.full(5, 2.0)))


def test_correlations_are_those_of_numpy_and_of_ranks():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=200)
    found = np.exp(truth + rng.normal(size=200))
    assert pearson(truth, found) == pytest.approx(np.corrcoef(truth, found)[0, 1])
    assert spearman(truth, np.exp(truth)) == pytest.approx(1.0)


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.95])
def test_the_influence_has_the_correlation_as_its_mean_and_its_spread(rho):
    """The influence's variance over rows, divided by n, is the variance of r over new samples.

    For a normal pair this is (1 - r^2)^2 / n (Fisher, 1915).
    """
    rng = np.random.default_rng(1)

    def sample(count: int) -> tuple[np.ndarray, np.ndarray]:
        a, b = rng.normal(size=(2, count))
        return a, rho * a + math.sqrt(1 - rho * rho) * b

    found = correlation_influence(*(pair := sample(200_000)))
    assert found.mean() == pytest.approx(pearson(*pair))
    assert found.var() == pytest.approx((1 - rho**2) ** 2, rel=0.05)
    drawn = [pearson(*sample(200)) for _ in range(2000)]
    assert np.var(drawn) == pytest.approx((1 - rho**2) ** 2 / 200, rel=0.15)
