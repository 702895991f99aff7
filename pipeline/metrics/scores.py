"""Of scores: how they go along with others, and how they rank the rows of lists.

Numpy arrays in, floats out; nan means "cannot be said".
"""

from __future__ import annotations

import math

import numpy as np


def pearson(truth: np.ndarray, found: np.ndarray) -> float:
    """Correlation of scores, in [-1, 1]; nan for fewer than two, or where one of both does not vary.

    Args:
        truth: (N,) float.
        found: (N,) float.
    """
    from scipy import stats

    if len(truth) < 2 or np.ptp(truth) == 0 or np.ptp(found) == 0:
        return math.nan
    return float(stats.pearsonr(truth.astype(np.float64), found.astype(np.float64)).statistic)


def spearman(truth: np.ndarray, found: np.ndarray) -> float:
    """Correlation of ranks, equal scores with the mean of theirs; arguments and result as of `pearson`."""
    from scipy import stats

    return pearson(stats.rankdata(truth), stats.rankdata(found))


def correlation_influence(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(N,) float64: the correlation r plus the influence of each pair on it.

    The mean is r, and the variance of the mean that of r to first order.

    r + a b - r (a^2 + b^2) / 2 with a and b the scores less their mean, over their standard
    deviation (Devlin, Gnanadesikan and Kettenring, 1975).
    """
    r = pearson(truth, found)
    if math.isnan(r):
        return np.full(len(truth), math.nan)
    a, b = ((values - values.mean()) / values.std() for values in (truth.astype(np.float64), found.astype(np.float64)))
    influence: np.ndarray = r + a * b - r * (a * a + b * b) / 2
    return influence


def ndcg(relevance: np.ndarray, scores: np.ndarray, lists: np.ndarray, *, cutoff: int = 10) -> np.ndarray:
    """Normalised discounted cumulative gain of each list (Jarvelin and Kekalainen, 2002; gains as they are, as trec_eval takes them).

    Args:
        relevance: (R,) float, of each row; below 0 counts as 0.
        scores: (R,) float. Of rows with the same score the less relevant one comes first: a model
            that gives one score to all gains nothing by it.
        lists: (R,) integers from 0: the list of each row.

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
    """1 over the place of the first row of each list that is relevant, which is above 0; arguments and result as of `ndcg`."""
    order = _ranked(relevance, scores, lists)
    places, relevant = _places(lists[order]), relevance[order] > 0
    first = np.full(int(lists.max(initial=-1)) + 1, np.nan)
    places, of = places[relevant][::-1], lists[order][relevant][::-1]
    first[of] = 1.0 / (places + 1)  # the last that is written is the first of its list
    return first


def _ranked(relevance: np.ndarray, scores: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """Rows list by list, in each by falling score."""
    return np.lexsort((relevance, -scores, lists))


def _places(lists: np.ndarray) -> np.ndarray:
    """(R,) lists, each in one run -> (R,) places within it, from 0."""
    starts = np.flatnonzero(np.append(True, lists[1:] != lists[:-1])) if len(lists) else np.zeros(0, dtype=np.int64)
    return np.arange(len(lists)) - np.repeat(starts, np.diff(np.append(starts, len(lists))))
