"""Metrics for scores: correlation with other scores, and ranking quality in lists.

NumPy arrays in, floats or arrays out; nan means that a value is undefined.
"""

from __future__ import annotations

import math

import numpy as np


def pearson(truth: np.ndarray, found: np.ndarray) -> float:
    """Pearson correlation in [-1, 1]; nan for fewer than two scores, or if either is constant.

    Args:
        truth: (N,) float.
        found: (N,) float.
    """
    from scipy import stats

    if len(truth) < 2 or np.ptp(truth) == 0 or np.ptp(found) == 0:
        return math.nan
    return float(stats.pearsonr(truth.astype(np.float64), found.astype(np.float64)).statistic)


def spearman(truth: np.ndarray, found: np.ndarray) -> float:
    """Spearman rank correlation, ties with mean ranks; arguments and result as for `pearson`."""
    from scipy import stats

    return pearson(stats.rankdata(truth), stats.rankdata(found))


def correlation_influence(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Return (N,) float64: the correlation r plus the influence of each pair on it.

    The mean of these values is r, and the variance of the mean is that of r to first order. Each is
    r + a b - r (a^2 + b^2) / 2, where a and b are the standardised scores (Devlin, Gnanadesikan and
    Kettenring, 1975).
    """
    r = pearson(truth, found)
    if math.isnan(r):
        return np.full(len(truth), math.nan)
    a, b = ((values - values.mean()) / values.std() for values in (truth.astype(np.float64), found.astype(np.float64)))
    influence: np.ndarray = r + a * b - r * (a * a + b * b) / 2
    return influence


def ndcg(relevance: np.ndarray, scores: np.ndarray, lists: np.ndarray, *, cutoff: int = 10) -> np.ndarray:
    """Normalised discounted cumulative gain of each list (Jarvelin and Kekalainen, 2002).

    Gains are the relevances themselves, as in trec_eval.

    Args:
        relevance: (R,) float, of each row; below 0 counts as 0.
        scores: (R,) float. Of rows with equal scores, the less relevant comes first, so that a
            model with constant scores gains nothing from ties.
        lists: (R,) integers from 0: the list of each row.
        cutoff: number of top ranks that count.

    Returns:
        (lists,) in [0, 1]; nan for a list without a relevant row.
    """
    count = int(lists.max(initial=-1)) + 1
    gains = np.maximum(relevance.astype(np.float64), 0.0)

    def gained(order: np.ndarray) -> np.ndarray:
        places = _places(lists[order])
        discounted = np.where(places < cutoff, gains[order] / np.log2(places + 2.0), 0.0)
        return np.bincount(lists[order], weights=discounted, minlength=count)

    found, best = gained(_ranked(gains, scores, lists)), gained(np.lexsort((-gains, lists)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(best > 0, found / best, np.nan)


def reciprocal_rank(relevance: np.ndarray, scores: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """1 / rank of the first relevant row of each list; arguments and result as for `ndcg`.

    A row is relevant if its relevance is above 0.
    """
    order = _ranked(relevance, scores, lists)
    places, relevant = _places(lists[order]), relevance[order] > 0
    first = np.full(int(lists.max(initial=-1)) + 1, np.nan)
    places, of = places[relevant][::-1], lists[order][relevant][::-1]
    first[of] = 1.0 / (places + 1)  # in reverse order, so the first row of a list is written last
    return first


def _ranked(relevance: np.ndarray, scores: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """Return row indices sorted by list, then by descending score."""
    return np.lexsort((relevance, -scores, lists))


def _places(lists: np.ndarray) -> np.ndarray:
    """Return (R,) ranks within each list, from 0; the rows of a list must be contiguous."""
    starts = np.flatnonzero(np.append(True, lists[1:] != lists[:-1])) if len(lists) else np.zeros(0, dtype=np.int64)
    return np.arange(len(lists)) - np.repeat(starts, np.diff(np.append(starts, len(lists))))
