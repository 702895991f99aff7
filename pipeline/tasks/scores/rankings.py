"""Metrics of scores that rank the rows of a list, such as the documents of a query."""

from __future__ import annotations

import numpy as np

from pipeline.metrics.scores import ndcg, reciprocal_rank
from pipeline.records import Predictions, is_known


def ranking_metrics(predictions: Predictions) -> dict[str, float]:
    """Return NDCG@10 and reciprocal rank, each the mean over the lists that have a relevant row."""
    lists = _by_list(predictions)
    return {"ndcg@10": _mean_of_known(ndcg(*lists)), "mrr": _mean_of_known(reciprocal_rank(*lists))}


def ranking_scores(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Return (lists,) NDCG@10 and (lists,) weights: 1, or 0 for a list without a relevant row."""
    count = 1 + int(_lists(predictions).max(initial=-1))
    found = ndcg(*_by_list(predictions))
    values, weights = np.zeros(count), np.zeros(count)
    known = np.flatnonzero(~np.isnan(found))
    values[known], weights[known] = found[known], 1.0
    return values, weights


def _mean_of_known(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _lists(predictions: Predictions) -> np.ndarray:
    """Return the (R,) list number of each row; without named lists, all rows form one list."""
    if predictions.groups is None:
        return np.zeros(len(predictions.labels), dtype=np.int64)
    return predictions.groups


def _by_list(predictions: Predictions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, scores and list numbers of the rows with a label.

    Rows without a label are removed from their lists.
    """
    known = is_known(predictions.labels)
    return predictions.labels[known], predictions.predicted[known], _lists(predictions)[known]
