"""Metrics of every model over rows, seeds and resamples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pipeline.evaluation.basis import Basis
from pipeline.evaluation.measures.observation import Observation
from pipeline.evaluation.measures.statistics import measured, proportion, resampled_means
from pipeline.evaluation.records import Measured

#: Metrics that are better when larger; the others are losses, errors and divergences.
HIGHER = (
    *("accuracy", "agreement", "average_precision", "exact", "f1", "precision", "recall", "macro_f1"),
    *("pearson", "spearman", "ndcg@10", "mrr"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """One metric of one model."""

    by_seed: np.ndarray
    """(S,): the metric of each seed over all rows."""
    rows: np.ndarray
    """(R,): sums over the positions of each row, averaged over seeds."""
    weights: np.ndarray
    """(R,): weights of the rows; the metric is the ratio of the totals."""
    resampled: np.ndarray
    """(resamples,): the metric over each resample of the rows."""

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return float(self.by_seed.mean())


class Scores:
    """Mapping from model and metric to `Column`.

    All models share the resamples of a metric, so differences and ratios of columns are paired.
    """

    def __init__(
        self, basis: Basis, observed: Mapping[str, Sequence[Observation]], *, resamples: int, seed: int
    ) -> None:
        """Compute all columns.

        Args:
            observed: name -> its observation with each seed, all on the same rows.
        """
        observed = {name: many for name, many in observed.items() if many}
        self.columns: dict[tuple[str, str], Column] = {}
        first = next(iter(observed.values()))[0]
        self.metrics = tuple(first.by_position())
        if basis.main_metric not in self.metrics:
            self.metrics = (basis.main_metric, *self.metrics)
        for metric in self.metrics:
            sums = {name: [_sums(basis, metric, one) for one in many] for name, many in observed.items()}
            known = [name for name, many in sums.items() if all(item is not None for item in many)]
            stacked = {name: np.array([item for item in sums[name] if item is not None]) for name in known}
            if not stacked:  # (S, 2, R) each
                continue
            means = np.array([stacked[name].mean(0) for name in known])  # (M, 2, R)
            resampled = resampled_means(means[:, 0], means[:, 1], resamples=resamples, seed=seed)
            for i, name in enumerate(known):
                with np.errstate(divide="ignore", invalid="ignore"):
                    by_seed = stacked[name][:, 0].sum(-1) / stacked[name][:, 1].sum(-1)
                self.columns[name, metric] = Column(by_seed, means[i, 0], means[i, 1], resampled[:, i])

    def has(self, name: str, metric: str) -> bool:
        """Whether the metric is defined for the model and its value known."""
        return (name, metric) in self.columns and bool(np.isfinite(self.columns[name, metric].by_seed).all())

    def __getitem__(self, key: tuple[str, str]) -> Column:
        return self.columns[key]

    def measured(self, name: str, metric: str) -> Measured:
        """One metric of one model with its intervals."""
        column = self.columns[name, metric]
        found = measured(column.mean, column.resampled, column.by_seed.tolist())
        each = column.weights > 0
        whole = bool((column.weights[each] == 1).all()) and bool(np.isin(column.rows[each], (0, 1)).all())
        binary = metric in HIGHER and bool(each.any()) and whole
        if binary and column.mean in (0.0, 1.0):
            count = int(each.sum())
            return dataclasses.replace(found, rows=proportion(round(column.mean * count), count), both=None)
        return found

    def combined(
        self, formula: Callable[..., np.ndarray], names: Sequence[str], metric: str, *, paired: bool = True
    ) -> Measured:
        """A function of one metric of several models, with its intervals.

        Args:
            formula: function of one array per model; called with means over seeds, values by seed,
                and resamples.
            paired: whether models with several seeds have the same seeds; otherwise there is no
                interval over seeds.
        """
        columns = [self.columns[name, metric] for name in names]
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(formula(*(np.asarray(column.mean) for column in columns)))
            resampled = formula(*(column.resampled for column in columns))
            counts = {len(column.by_seed) for column in columns} - {1}
            alone = max(len(column.by_seed) for column in columns) == 1
            by_seed = () if alone or not paired or len(counts) > 1 else formula(*(column.by_seed for column in columns))
        return measured(value, resampled, [float(v) for v in np.atleast_1d(by_seed)] if len(by_seed) else ())


def _sums(basis: Basis, metric: str, observation: Observation) -> np.ndarray | None:
    """(2, R): sums and weights whose ratio of totals is the metric.

    None: the observation does not have the metric.
    """
    by_position = observation.by_position()
    if metric in by_position:
        return np.array([observation.row_sums(by_position[metric]), observation.row_weights(metric)])
    if metric == basis.main_metric:
        scores, weights = basis.row_scores(observation.predictions)
        return np.array([np.where(weights > 0, scores, 0.0), weights])
    return None
