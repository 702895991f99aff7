"""Reliability diagrams, and temperature scaling fitted on other rows than it is evaluated on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import Cache
from pipeline.cache.format.codec import positions_of, text_bytes_of, tokens_of
from pipeline.errors import CacheError
from pipeline.evaluation.basis import Basis
from pipeline.evaluation.measures.observation import Observation
from pipeline.evaluation.measures.scores import Scores as ScoreTable
from pipeline.evaluation.passes import logits_by_batch
from pipeline.evaluation.records import Bin, Calibration
from pipeline.evaluation.run import groups_of
from pipeline.metrics import expected_calibration_error
from pipeline.models import LoadedModel
from pipeline.models.scoring import Scores, score_of
from pipeline.records import NO_LABEL, Predictions, is_known
from pipeline.tasks import Task

#: Temperatures at which the loss is computed. A spline interpolates between them; its minimum is
#: within 0.1% of the true one.
GRID = np.geomspace(0.125, 8.0, 25)

NUM_BINS = 15

_CHUNK = 1 << 24
"""Number of elements of (positions, classes) that are scaled at once: 64 MB."""


@dataclass(frozen=True, slots=True)
class TemperatureFit:
    """Result of one pass over the rows that temperatures are fitted on."""

    row_temperatures: np.ndarray | None
    """(R,) float64, the temperature of each row of the reported split. None: the task predicts
    scores, which have no probabilities."""
    main_metric: float | None
    """Main metric of the unscaled model on the calibration split; None: there is no such split."""


def fit_temperatures(
    cache: Cache, basis: Basis, model: LoadedModel, name: str, split: str, fitted_on: str | None, batch_size: int
) -> TemperatureFit:
    """Fit the temperature that minimizes the loss, never on the row that it will scale.

    Args:
        split: the rows to scale.
        fitted_on: another split to fit one temperature on; None: each half of `split` is scaled by
            the temperature fitted on the other half.

    Guo et al. 2017, "On calibration of modern neural networks".
    """
    losses = np.zeros((2, len(GRID)))  # per half
    parts: list[Scores] = []
    labels: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    text_bytes: list[np.ndarray] = []
    source = fitted_on or split
    is_score = basis.task.target == "score"
    if is_score and fitted_on is None:
        return TemperatureFit(None, None)
    for rows, batch, logits in logits_by_batch(cache, basis.task, model, source, batch_size, f"calibrate {name}"):
        fold = np.repeat(halves(rows.numbers["source_row"]), positions_of(rows))
        each = scaled_losses(logits, batch.labels) if not is_score else np.zeros((len(logits), len(GRID)))
        for half in (0, 1):
            losses[half] += each[fold == half].sum(0)
        parts.append(score_of(basis.task, logits, batch.labels))
        labels.append(batch.labels.cpu().numpy())
        owners.append(np.repeat(np.arange(len(rows)), positions_of(rows)) + sum(map(len, text_bytes)))
        text_bytes.append(text_bytes_of(rows))
    folds = halves(cache.dataset(split).column("source_row"))
    if fitted_on is None:
        return TemperatureFit(np.array([best_temperature(losses[1 - half]) for half in (0, 1)])[folds], None)
    contract = cache.manifest.contract
    predictions = _predictions(
        parts, np.concatenate(labels), np.concatenate(owners), np.concatenate(text_bytes), contract.label_names
    )
    predictions = dataclasses.replace(predictions, groups=groups_of(cache, source))
    metrics = basis.task.metrics(predictions, contract.num_classes)
    scales = None if is_score else np.full(len(folds), best_temperature(losses.sum(0)))
    return TemperatureFit(scales, metrics[basis.main_metric])


def halves(source_rows: np.ndarray) -> np.ndarray:
    """(R,) source rows -> (R,) 0 or 1; all pieces of a source row are in the same half.

    The half is one bit of a multiplicative hash, since classes may alternate in a data set.
    """
    hashed = source_rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # modulo 2^64
    return (hashed >> np.uint64(63)).astype(np.int64)


def _predictions(
    parts: list[Scores], labels: np.ndarray, owners: np.ndarray, text_bytes: np.ndarray, names: tuple[str, ...] | None
) -> Predictions:
    predicted = np.concatenate([part.predicted for part in parts])
    return Predictions(
        labels=labels,
        predicted=predicted,
        confidence=np.concatenate([part.confidence for part in parts]),
        nll=np.concatenate([part.nll for part in parts]),
        teacher_predicted=predicted,
        rows=owners,
        row_kl=np.zeros(len(text_bytes)),
        row_text_bytes=text_bytes,
        label_names=names,
    )


@torch.inference_mode()
def scaled_losses(logits: Tensor, labels: Tensor) -> np.ndarray:
    """(N, V) logits and (N,) labels -> (N, G) losses in nats on the grid; 0 without a label."""
    out = np.zeros((len(labels), len(GRID)))
    step = max(1, _CHUNK // logits.shape[-1])
    for start in range(0, len(labels), step):
        z, y = logits[start : start + step], labels[start : start + step]
        chosen = z.gather(-1, y.clamp_min(0)[:, None])[:, 0]
        for g, temperature in enumerate(GRID.tolist()):
            nll = torch.logsumexp(z / temperature, -1) - chosen / temperature
            out[start : start + step, g] = nll.masked_fill(y == NO_LABEL, 0.0).double().cpu().numpy()
    return out


def best_temperature(losses: np.ndarray) -> float:
    """The maximum a posteriori temperature.

    Args:
        losses: (G,) sums over rows in nats, on the grid.

    Returns:
        The minimum of the loss with the prior log T ~ N(0, 1). The prior weighs about as much as
        one row: T stays finite if every row is right, and is 1 without rows.
    """
    from scipy.interpolate import CubicSpline
    from scipy.optimize import minimize_scalar

    if not np.isfinite(losses).all():
        return 1.0
    log_t = np.log(GRID)
    total = losses + log_t**2 / 2
    best = int(total.argmin())
    around = log_t[[max(best - 1, 0), min(best + 1, len(GRID) - 1)]]
    spline = CubicSpline(log_t, total)
    found = minimize_scalar(spline, bounds=(float(around[0]), float(around[1])), method="bounded")
    return float(np.exp(found.x))


def reliability(confidence: np.ndarray, right: np.ndarray) -> tuple[Bin, ...]:
    """Bins of a reliability diagram, of equal width over [0, 1]; empty ones are left out.

    Args:
        confidence: (N,) float, probability of the predicted class; nan if unknown, which yields no
            bins.
        right: (N,) bool.
    """
    if not len(confidence) or np.isnan(confidence).any():
        return ()
    which = np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    counts = np.bincount(which, minlength=NUM_BINS)
    sums = np.bincount(which, weights=confidence, minlength=NUM_BINS)
    hits = np.bincount(which, weights=right.astype(np.float64), minlength=NUM_BINS)
    return tuple(
        Bin(int(n), float(total / n), float(hit / n)) for n, total, hit in zip(counts, sums, hits, strict=True) if n
    )


def calibration_line(
    name: str, seen: Sequence[Observation], scores: ScoreTable, temperature: float | None
) -> Calibration:
    """Calibration of one model over its labelled positions.

    ECE is the mean over seeds; the diagram pools the positions of all seeds.
    """
    errors, diagrams = [], []
    for one in seen:
        known = one.labelled
        errors.append(expected_calibration_error(one.predictions.confidence[known], one.right[known]))
        diagrams.append(reliability(one.predictions.confidence[known], one.right[known]))
    return Calibration(
        name=name,
        ece=float(np.mean(errors)),
        brier=scores.measured(name, "brier") if scores.has(name, "brier") else None,
        nll=scores.measured(name, "loss") if (name, "loss") in scores.columns else None,
        bins=pooled(diagrams),
        temperature=temperature,
    )


def pooled(bins: Sequence[tuple[Bin, ...]]) -> tuple[Bin, ...]:
    """Pool the bins of several seeds into one diagram."""
    if not all(bins):
        return ()
    merged: dict[int, list[Bin]] = {}
    for found in bins:
        for item in found:
            merged.setdefault(min(int(item.confidence * NUM_BINS), NUM_BINS - 1), []).append(item)
    return tuple(_mean(merged[key]) for key in sorted(merged))


def _mean(items: list[Bin]) -> Bin:
    count = sum(item.count for item in items)
    return Bin(
        count,
        sum(item.confidence * item.count for item in items) / count,
        sum(item.accuracy * item.count for item in items) / count,
    )


def calibration_split(cache: Cache, task: Task, asked: str | None, reported: str) -> str | None:
    """The split to fit temperatures on: the configured one, or `validation`.

    None if no split is configured and `validation` is missing, reported or without labels.

    Raises:
        CacheError: the configured split does not exist or has no labels.
    """
    name = asked or "validation"
    if asked is None and (name not in cache.splits or name == reported):
        return None
    labelled = any(is_known(task.hard_labels(tokens_of(rows))).any() for rows in cache.dataset(name).blocks())
    if asked is not None and not labelled:
        raise CacheError(
            f"--calibration-split {asked}: no row of {cache.root} has a hard label there; name another, or none"
        )
    return name if labelled else None
