"""Intervals and tests over rows and seeds, as pure functions of arrays.

Rows are the unit of resampling, since positions of one row are dependent. All models are resampled
together, so that the difficulty of a row cancels in differences and ratios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pipeline.evaluation.records import Measured
from pipeline.metrics import paired_mean_interval
from pipeline.records import Interval

#: Number of elements of one chunk of resampling counts: 32 MB.
_CHUNK = 1 << 22


def resampled_means(scores: np.ndarray, weights: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Means of several models over the same resamples of the rows.

    Args:
        scores: (M, R) float, sums over each row's positions of the values that are averaged.
        weights: (M, R) float, number of counted positions per row; rows of weight 0 in all models
            are never drawn.

    Returns:
        (resamples, M): sum of scores / sum of weights; nan for a model whose scores have a nan.

    Efron and Tibshirani 1993, "An introduction to the bootstrap", chapter 13.
    """
    rng = np.random.default_rng(seed)
    kept = (weights > 0).any(0)
    stacked = np.vstack([scores[:, kept], weights[:, kept]]).astype(np.float64).T  # (R, 2 M)
    count, width = len(stacked), len(scores)
    if not count:
        return np.full((resamples, width), np.nan)
    parts = []
    size = max(1, _CHUNK // count)
    for start in range(0, resamples, size):
        number = min(size, resamples - start)
        drawn = rng.integers(0, count, (number, count)) + np.arange(number)[:, None] * count
        counts = np.bincount(drawn.ravel(), minlength=number * count).reshape(number, count)
        parts.append(counts @ stacked)
    sums = np.concatenate(parts)
    with np.errstate(divide="ignore", invalid="ignore"):
        means: np.ndarray = sums[:, :width] / sums[:, width:]
    return means


def measured(value: float, resampled: np.ndarray, by_seed: Sequence[float] = ()) -> Measured:
    """A value with its intervals.

    Args:
        value: the estimate.
        resampled: (resamples,) the estimate over resampled rows, with all seeds.
        by_seed: the estimate of each seed, over all rows.
    """
    rows = percentiles(resampled)
    seeds = np.asarray(by_seed, dtype=np.float64)
    if len(seeds) < 2 or rows is None or not np.isfinite(seeds).all():
        return Measured(float(value), rows)
    return Measured(float(value), rows, seeds=paired_mean_interval(seeds), both=_crossed(value, resampled, seeds))


def percentiles(resampled: np.ndarray) -> Interval | None:
    """The 2.5% and 97.5% percentiles; None if the value of a resample is not finite."""
    if not len(resampled) or not np.isfinite(resampled).all():
        return None
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(float(low), float(high))


def proportion(successes: int, count: int) -> Interval:
    """Exact binomial interval (Clopper and Pearson 1934).

    Unlike the bootstrap, it has a width for shares of 0 and 1.
    """
    from scipy import stats

    found = stats.binomtest(successes, count).proportion_ci(0.95, method="exact")
    return Interval(float(found.low), float(found.high))


def _crossed(value: float, resampled: np.ndarray, seeds: np.ndarray) -> Interval:
    """Combine rows and seeds as crossed random effects.

    Variances add; the degrees of freedom follow Welch and Satterthwaite. The interaction of rows
    and seeds is in both variances, so the interval is conservative.
    """
    from scipy import stats

    of_rows = float(resampled.var(ddof=1))
    of_seeds = float(seeds.var(ddof=1)) / len(seeds)
    total = of_rows + of_seeds
    if total == 0:
        return Interval(float(value), float(value))
    freedom = total**2 / (of_seeds**2 / (len(seeds) - 1)) if of_seeds else math.inf
    half = float(stats.t.ppf(0.975, min(freedom, 1e9))) * math.sqrt(total)
    return Interval(float(value) - half, float(value) + half)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided exact McNemar test of two models' right answers on the same rows.

    Args:
        first: (R,) bool.
        second: (R,) bool.

    Returns:
        The p-value; 1 if the models never differ.

    McNemar 1947; exact: if only one model is right on a row, both are equally likely to be it.
    """
    from scipy import stats

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    if not only_first + only_second:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second).pvalue)


def paired_permutation(differences: np.ndarray, *, resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided sign-flip test of paired differences; null hypothesis: symmetric around 0.

    Args:
        differences: (R,) float, first minus second, one per row.

    Returns:
        The p-value, at least 1 / (resamples + 1) unless all flips are enumerated; 1 if at most one
        difference is not 0, nan if one is nan.
    """
    from scipy import stats

    if np.isnan(differences).any():
        return math.nan
    some = differences[differences != 0]  # a flip does not change a difference of 0
    if len(some) < 2:  # both signs of a single difference are equally far from 0
        return 1.0
    result = stats.permutation_test(
        (some,),
        lambda sample, axis: sample.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _CHUNK // len(some)),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def paired_t(differences: np.ndarray) -> float | None:
    """Two-sided t-test over paired seeds; None for fewer than two, or if all are equal."""
    from scipy import stats

    if len(differences) < 2 or np.ptp(differences) == 0:
        return None
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple testing, controlling the family-wise error (Holm 1979).

    nan stays nan.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        adjusted[i] = largest
    return adjusted
