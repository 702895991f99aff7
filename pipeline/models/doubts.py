"""Find signs in a model's predictions that it is not trained well, and warn of them."""

from __future__ import annotations

import logging
import math

import numpy as np

from pipeline.metrics.scores import pearson
from pipeline.records import Predictions, is_known

logger = logging.getLogger(__name__)

#: A difference of mean confidence and accuracy above this is reported, for at least this many
#: labelled positions.
_GAP, _ENOUGH = 0.2, 30


def doubts(predictions: Predictions) -> tuple[str, ...]:
    """Return the signs that a classifier is no better than chance, or poorly calibrated.

    With classes: accuracy no better than that of the majority class, or mean confidence far from
    accuracy. With scores: no correlation with the labels.

    Returns:
        One clause per sign; none if the labels have fewer than two classes, or too few positions
        are labelled.
    """
    known = is_known(predictions.labels)
    if predictions.labels.dtype.kind == "f":
        return _doubts_of_scores(predictions, known)
    classes, counts = np.unique(predictions.labels[known], return_counts=True)
    if len(classes) < 2:
        return ()
    accuracy = float((predictions.predicted[known] == predictions.labels[known]).mean())
    majority = float(counts.max() / counts.sum())
    found = []
    if accuracy <= majority:
        found.append(
            f"its accuracy of {accuracy:.1%} is no better than that of always predicting the most common class ({majority:.1%})"
        )
    confidence = float(predictions.confidence[known].mean())
    if counts.sum() >= _ENOUGH and abs(confidence - accuracy) > _GAP:  # False if the confidence is nan (unknown)
        found.append(
            f"its mean confidence is {confidence:.1%} and its accuracy {accuracy:.1%}: its probabilities are poorly calibrated"
        )
    return tuple(found)


def _doubts_of_scores(predictions: Predictions, known: np.ndarray) -> tuple[str, ...]:
    """Return a clause for each output whose scores do not correlate with the labels.

    Another scale than that of the labels is no sign, since only ranks may matter.
    """
    count = 1 if predictions.label_names is None else len(predictions.label_names)
    names = predictions.label_names or ("score",)
    columns = zip(
        names, *(each.reshape(-1, count).T for each in (predictions.labels, predictions.predicted, known)), strict=True
    )
    found = []
    for name, truth, scores, where in columns:
        r, number = pearson(truth[where], scores[where]), int(where.sum())
        if number >= _ENOUGH and not r > 2 / math.sqrt(number):
            what = (
                "do not vary"
                if math.isnan(r)
                else f"have a correlation of {r:.3f} with the labels, no better than chance"
            )
            found.append(f"its scores {what}" + (f" ({name})" if count > 1 else ""))
    return tuple(found)


def warn_of_doubts(predictions: Predictions, model: str, split: str) -> tuple[str, ...]:
    """Warn of each sign in one line, with the split and the number of labelled positions.

    Returns:
        The lines.
    """
    labelled = int(is_known(predictions.labels).sum())
    lines = tuple(f"{model}, split {split}, {labelled} labelled positions: {doubt}" for doubt in doubts(predictions))
    for line in lines:
        logger.warning("%s", line)
    return lines
