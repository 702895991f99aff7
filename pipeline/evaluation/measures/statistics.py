"""Intervals and tests over rows and seeds. Pure functions over arrays; nothing here knows a model.

Rows are the unit: positions of one row depend on each other. All models are resampled together, so
that what makes a row hard for all cancels in differences and ratios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pipeline.evaluation.records import Measured
from pipeline.metrics import paired_mean_interval
from pipeline.records import Interval

#: Elements of one chunk of resampling counts: 32 MB.
_CHUNK = 1 << 22


def resampled_means(scores: np.ndarray, weights: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Means of several models over the same resamples of the rows.

    Args:
        scores: (M, R) float, sums over each row's positions of what the metric averages.
        weights: (M, R) float, positions of each row that count; rows of weight 0 in all models are
            never drawn.

    Returns:
        (resamples, M): sum of scores over sum of weights. A model whose scores have a nan is nan.

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
    """A figure with its intervals.

    Args:
        value: the figure.
        resampled: (resamples,) the same over resampled rows, all seeds in it.
        by_seed: the same of each seed by itself, over all rows.
    """
    rows = percentiles(resampled)
    seeds = np.asarray(by_seed, dtype=np.float64)
    if len(seeds) < 2 or rows is None or not np.isfinite(seeds).all():
        return Measured(float(value), rows)
    return Measured(float(value), rows, seeds=paired_mean_interval(seeds), both=_crossed(value, resampled, seeds))


def percentiles(resampled: np.ndarray) -> Interval | None:
    """The 2.5% and 97.5% percentiles; None where a resample has no finite value."""
    if not len(resampled) or not np.isfinite(resampled).all():
        return None
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(float(low), float(high))


def proportion(successes: int, count: int) -> Interval:
    """Exact binomial interval (Clopper and Pearson 1934), also for shares of 0 and 1."""
    from scipy import stats

    found = stats.binomtest(successes, count).proportion_ci(0.95, method="exact")
    return Interval(float(found.low), float(found.high))


def _crossed(value: float, resampled: np.ndarray, seeds: np.ndarray) -> Interval:
    """Combine rows and seeds as crossed random effects (Welch and Satterthwaite).

    What rows and seeds do together stands in both variances, so that the interval errs on the wide
    side.
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
        The p-value; 1 where they never differ.

    McNemar 1947; exact: given that one of them is right, each is as likely.
    """
    from scipy import stats

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    if not only_first + only_second:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second).pvalue)


def paired_permutation(differences: np.ndarray, *, resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided sign-flip test that paired differences are as likely below 0 as above.

    Args:
        differences: (R,) float, first minus second, a row each.

    Returns:
        The p-value, at least 1 / (resamples + 1) unless all flips can be tried; 1 where at most one
            is not 0, nan where one is nan.
    """
    from scipy import stats

    if np.isnan(differences).any():
        return math.nan
    some = differences[differences != 0]  # a difference of 0 stays what it is
    if len(some) < 2:  # either sign of one difference is as far from 0
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
    """Two-sided t-test over paired seeds; None for fewer than two, or where they do not vary."""
    from scipy import stats

    if len(differences) < 2 or np.ptp(differences) == 0:
        return None
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979); nan stays nan."""
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        adjusted[i] = largest
    return adjusted
