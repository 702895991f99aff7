"""Metrics as pure functions over predictions: NumPy arrays in, floats out.

The functions do not depend on a model, a task or a cache. nan means that a value is undefined,
because there is no labelled position, no text or too few rows. It is never an error, so that one
undefined metric does not prevent others. torchmetrics and scipy are imported on first use (4
seconds).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.metrics.scores import pearson
from pipeline.records import NO_LABEL, Interval, Predictions

#: Elements of one chunk of bootstrap indices: 8 MB for the indices, and 8 MB for every array that
#: they gather.
RESAMPLE_CHUNK = 1 << 20

_UNKNOWN = Interval(math.nan, math.nan)


# -------------------------------------------------------------------------- against the hard labels


def accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Share of labelled positions whose prediction is the label.

    Args:
        labels: (N,) integers, -100 if unknown.
        predicted: (N,) integers.

    Returns:
        In [0, 1]; nan if nothing is labelled.
    """
    known = labels != NO_LABEL
    return agreement(labels[known], predicted[known])


def macro_f1(labels: np.ndarray, predicted: np.ndarray, *, num_classes: int) -> float:
    """Mean over classes of the F1 score, with equal weight for every class.

    Args:
        labels: (N,) integers in [0, num_classes), -100 if unknown.
        predicted: (N,) integers in [0, num_classes).
        num_classes: V, at least 2. Time and memory are O(V), which suits classifiers, not
            vocabularies.

    Returns:
        In [0, 1]; nan if nothing is labelled. A class that is neither a label nor predicted at a
        labelled position is left out of the mean. One that is only a label, or only predicted,
        counts as 0. torchmetrics and scikit-learn agree on both.
    """
    import torch
    from torchmetrics.functional.classification import multiclass_f1_score

    known = labels != NO_LABEL
    if not known.any():
        return math.nan
    predictions, targets = (torch.from_numpy(values[known].astype(np.int64)) for values in (predicted, labels))
    return float(multiclass_f1_score(predictions, targets, num_classes=num_classes, average="macro"))


@dataclass(frozen=True, slots=True)
class LabelScores:
    """Mean scores of multi-label classification over the labels; nan if no label qualifies."""

    macro_f1: float
    """Over the labels that are true or predicted somewhere."""
    average_precision: float
    """Area under the precision-recall curve, as a sum over thresholds; over the labels that some
    row has."""
    calibration_error: float
    """Difference between predicted probability and frequency of a label, with 15 bins of equal
    width."""


def label_scores(labels: np.ndarray, probabilities: np.ndarray) -> LabelScores:
    """Compute the scores of each label of multi-label classification, and average them.

    Args:
        labels: (R, L) integers, 1 if the row has the label, 0 if not, -100 if unknown.
        probabilities: (R, L) float, of having the label; nan if unknown.

    Each label is scored by torchmetrics; scikit-learn agrees on F1 and average precision.
    """
    import torch
    from torchmetrics.functional.classification import (
        binary_average_precision,
        binary_calibration_error,
        binary_f1_score,
    )

    found: dict[str, list[float]] = {"f1": [], "precision": [], "calibration": []}
    for truth, share in zip(labels.T, probabilities.T, strict=True):
        known = truth != NO_LABEL
        if not known.any() or np.isnan(share[known]).any():
            continue
        target = torch.from_numpy(truth[known].astype(np.int64))
        given = torch.from_numpy(np.clip(share[known], 0.0, 1.0, dtype=np.float64))
        found["calibration"].append(float(binary_calibration_error(given, target, n_bins=15, norm="l1")))
        if target.any():
            found["precision"].append(float(binary_average_precision(given, target)))
        if target.any() or bool((given > 0.5).any()):
            found["f1"].append(float(binary_f1_score(given, target)))
    means = [float(np.mean(values)) if values else math.nan for values in found.values()]
    return LabelScores(*means)


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the entities in the tags of a row.

    Args:
        tags: "O", or the label of an entity with an optional prefix for the position in it: BIO,
            BIOES, BILOU, or no prefix.

    Returns:
        (label, first word, word after the last) of each entity, in order. A tag that continues an
        entity which is not open begins one, as in the evaluation of CoNLL-2000 (conlleval) and in
        seqeval's default mode.
    """
    found: list[tuple[str, int, int]] = []
    start, before, label_before = 0, _OUTSIDE, ""
    for i, tag in enumerate([*tags, _OUTSIDE]):
        prefix, dash, label = tag.partition("-")
        if prefix not in _PREFIXES or not dash:
            prefix, label = (_OUTSIDE, "") if tag == _OUTSIDE else ("I", tag)
        is_open = before != _OUTSIDE
        ends = is_open and (before in _LAST or prefix in _FIRST or prefix == _OUTSIDE or label != label_before)
        if ends:
            found.append((label_before, start, i))
        if prefix != _OUTSIDE and (ends or not is_open):
            start = i
        before, label_before = prefix, label
    return found


def entity_counts(
    labels: np.ndarray, predicted: np.ndarray, rows: np.ndarray, names: Sequence[str], num_rows: int
) -> np.ndarray:
    """Count the entities of each row over its labelled positions.

    Args:
        labels: (N,) integers, -100 if unknown.
        predicted: (N,) integers.
        rows: (N,) the row of each position, in ascending order.
        names: names of the classes. Without a class "O", every position is an entity, for example
            in part-of-speech tagging.
        num_rows: R.

    Returns:
        (R, 3) int64: correct entities (same label and both ends), predicted and true entities.
    """
    known = np.flatnonzero(labels != NO_LABEL)
    if _OUTSIDE not in names:
        right = np.bincount(rows[known], weights=labels[known] == predicted[known], minlength=num_rows)
        every = np.bincount(rows[known], minlength=num_rows)
        return np.stack([right.astype(np.int64), every, every], 1)
    counts = np.zeros((num_rows, 3), dtype=np.int64)
    parts = np.split(known, np.flatnonzero(np.diff(rows[known])) + 1) if len(known) else []
    for part in parts:
        true, found = (set(entities([names[i] for i in values[part].tolist()])) for values in (labels, predicted))
        counts[rows[part[0]]] = len(true & found), len(found), len(true)
    return counts


_OUTSIDE = "O"
_FIRST, _LAST = ("B", "S", "U"), ("E", "S", "L", "U")
_PREFIXES = ("I", *_FIRST, *_LAST)


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, *, num_bins: int = 15) -> float:
    """Mean absolute difference between confidence and accuracy, over bins of confidence.

    Args:
        confidence: (N,) float, the probability of the predicted class, at labelled positions only.
        correct: (N,) bool, whether the prediction is the label.
        num_bins: number of bins of equal width over [0, 1]. A confidence of exactly 1 has its own
            bin.

    Returns:
        In [0, 1]; nan without positions, or if a confidence is nan.

    Naeini et al. 2015, "Obtaining well calibrated probabilities using Bayesian binning", top label,
    L1 norm.
    """
    import torch
    from torchmetrics.functional.classification import binary_calibration_error

    if confidence.size == 0 or np.isnan(confidence).any():
        return math.nan
    # If one value exceeds 1, torchmetrics treats all of them as logits, and exp() of a
    # log-probability may exceed 1 by an ulp. float64, since torchmetrics computes the bins in the
    # type of the confidences.
    top = torch.from_numpy(np.clip(confidence, 0.0, 1.0, dtype=np.float64))
    return float(binary_calibration_error(top, torch.from_numpy(correct.astype(np.int64)), n_bins=num_bins, norm="l1"))


def mean_nll(nll: np.ndarray) -> float:
    """Mean negative log-likelihood of the hard labels.

    Args:
        nll: (N,) float, nats; nan without a label.

    Returns:
        Nats per labelled position; nan if nothing is labelled.
    """
    known = nll[~np.isnan(nll)]
    return float(known.mean(dtype=np.float64)) if known.size else math.nan


def perplexity(mean_nll: float) -> float:
    """Exponential of a mean negative log-likelihood in nats; inf on overflow."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf


def bits_per_byte(nll_sum: float, text_bytes: int) -> float:
    """Negative log-likelihood per byte of text, which is comparable between tokenizers.

    Args:
        nll_sum: nats, summed over the positions that predict the text.
        text_bytes: UTF-8 bytes of that text.

    Returns:
        Bits per byte; nan without text.
    """
    return nll_sum / math.log(2) / text_bytes if text_bytes else math.nan


# ------------------------------------------------------------------------------ against the teacher


def agreement_of(predictions: Predictions) -> float:
    """Agreement of a model with its teacher; for scores, the mean correlation over the outputs."""
    ours, theirs = predictions.predicted, predictions.teacher_predicted
    if ours.dtype.kind != "f":
        return agreement(ours, theirs)
    count = 1 if predictions.label_names is None else len(predictions.label_names)
    pairs = zip(ours.reshape(-1, count).T, theirs.reshape(-1, count).T, strict=True)
    known = [r for mine, other in pairs if not math.isnan(r := pearson(mine, other))]
    return float(np.mean(known)) if known else math.nan


def agreement(predicted: np.ndarray, teacher_predicted: np.ndarray) -> float:
    """Share of positions where model and teacher predict the same class, labelled or not.

    Args:
        predicted: (N,) integers.
        teacher_predicted: (N,) integers; -100 where the teacher has no prediction. Such positions
            are left out.

    Returns:
        In [0, 1]; nan without positions.
    """
    known = teacher_predicted != NO_LABEL
    return float((predicted == teacher_predicted)[known].mean()) if known.any() else math.nan


# --------------------------------------------------------------------------------------- formatting

#: Metrics that are shown in percent.
_SHARES = (
    *("accuracy", "average_precision", "exact", "f1", "precision", "recall", "macro_f1", "ece", "agreement"),
    *("ndcg@10", "mrr"),
)


def number(name: str | None, value: float) -> str:
    """Format a metric: shares in percent, others in their unit, nan as a dash."""
    if math.isnan(value):
        return "-"
    return f"{value:.1%}" if name in _SHARES else f"{value:.3f}"


def on_split(metrics: Mapping[str, float], split: str, rows: int | None, of: str = "rows") -> str:
    """Format metrics in one line: `accuracy 86.0%, loss 0.412 on test, 300 rows`.

    Args:
        rows: number of rows; None: unknown.
        of: what is counted.
    """
    shown = ", ".join(f"{name} {number(name, value)}" for name, value in metrics.items())
    return f"{shown} on {split}" + ("" if rows is None else f", {rows:,} {of}")


# ---------------------------------------------------------------------------------------- intervals


def bootstrap_ratio(
    student_row_scores: np.ndarray,
    teacher_row_scores: np.ndarray,
    row_weights: np.ndarray | None = None,
    *,
    of: tuple[np.ndarray, np.ndarray] | None = None,
    seed: int = 0,
    resamples: int = 2000,
    inverse: bool = False,
) -> Interval:
    """Bootstrap 95% confidence interval of a student's score divided by its teacher's.

    Both scores are totals over a split. Rows are resampled rather than positions, because positions
    of one row depend on each other. Both models are scored on the same rows, so that differences in
    difficulty cancel.

    Args:
        student_row_scores: (R,) float, not negative: the sum over the row's positions of what the
            metric averages (correct predictions, nats). nan in a row of both models: the row has no
            label and is left out.
        teacher_row_scores: (R,) float, the same for the teacher.
        row_weights: (R,) float, the number of positions of each row, if scores are means over a row
            instead of sums.
        of: (R,) each, for student and teacher: denominators of the scores, if they differ between
            the models, such as numbers of predicted and true entities.
        seed: seed of the resampling.
        resamples: number of times that R rows are drawn with replacement.
        inverse: teacher over student, for a metric that is better when smaller.

    Returns:
        The 2.5% and 97.5% percentiles of sum(student) / sum(teacher) over the resamples; with `of`,
        each sum is divided by the sum of its denominators. Exactly (1, 1) for equal scores. nan for
        fewer than two rows, or if only one of the models has a nan. A resample with a zero
        denominator counts as inf, and is dropped if its numerator is zero too.

    Raises:
        ValueError: the arrays differ in shape.

    Efron and Tibshirani 1993, "An introduction to the bootstrap", chapter 13. The percentile
    interval is used, because the bias-corrected one (BCa) costs O(R^2) and is undefined for equal
    models. Apart from their ratios, memory does not grow with `resamples`.
    """
    from scipy import stats

    weights = np.ones(student_row_scores.shape) if row_weights is None else row_weights
    if not student_row_scores.shape == teacher_row_scores.shape == weights.shape:
        raise ValueError(f"shapes differ: {student_row_scores.shape}, {teacher_row_scores.shape}, {weights.shape}")
    labelled = ~(np.isnan(student_row_scores) & np.isnan(teacher_row_scores))
    pair = (teacher_row_scores, student_row_scores) if inverse else (student_row_scores, teacher_row_scores)
    numerators, denominators = (scores[labelled].astype(np.float64) * weights[labelled] for scores in pair)
    wholes = () if of is None else tuple(whole[labelled] for whole in (of[::-1] if inverse else of))
    if numerators.size < 2 or np.isnan(numerators.sum() + denominators.sum()):
        return _UNKNOWN
    result = stats.bootstrap(
        (numerators, denominators, *wholes),
        lambda *samples, axis: np.stack([sample.sum(axis=axis) for sample in samples]),  # (2 or 4, batch)
        n_resamples=resamples,
        batch=max(1, RESAMPLE_CHUNK // numerators.size),
        vectorized=True,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    # (2 or 4, resamples); ratios are computed here, so that 0 / 0 can be dropped
    sums = result.bootstrap_distribution
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = sums[0] / sums[1] if of is None else (sums[0] / sums[2]) / (sums[1] / sums[3])
    ratios = ratios[~np.isnan(ratios)]
    if not ratios.size:
        return _UNKNOWN
    # Use an order statistic: interpolation between a number and inf would give nan.
    low, high = np.quantile(ratios, [0.025, 0.975], method="inverted_cdf")
    return Interval(float(low), float(high))


def share_interval(count: int, total: int) -> Interval:
    """Return Wilson's 95% confidence interval of a share, from a random sample (Wilson, 1927).

    `count` of the `total` drawn, at least 1, are hits.
    """
    z = 1.959964
    share = count / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Interval(centre - half, centre + half)


def paired_mean_interval(differences: np.ndarray, confidence: float = 0.95) -> Interval:
    """Return Student's t interval of the mean of paired differences, such as those of two methods.

    Args:
        differences: (n,) float, one per pair, assumed to be independent and roughly normal.
        confidence: in (0, 1).

    Returns:
        Mean plus and minus t_{n-1} standard errors; nan for fewer than two pairs.
    """
    from scipy import stats

    if differences.size < 2:
        return _UNKNOWN
    mean = float(differences.mean(dtype=np.float64))
    half = float(stats.t.ppf((1 + confidence) / 2, differences.size - 1) * stats.sem(differences.astype(np.float64)))
    return Interval(mean - half, mean + half)
