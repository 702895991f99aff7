"""What tasks with one class per row share: the check of the head, and the metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from pipeline.errors import ModelError
from pipeline.metrics import accuracy, expected_calibration_error, macro_f1, mean_nll
from pipeline.records import NO_LABEL, Predictions


def num_labels(model: nn.Module) -> int:
    """Return the number of labels of a classifier.

    Raises:
        ModelError: the model is not a classifier of at least 2 exclusive labels: a regression has
            one label, and a multi-label classifier gives no single distribution.
    """
    config: Any = model.config
    if config.num_labels < 2 or config.problem_type in ("regression", "multi_label_classification"):
        kind = config.problem_type or "regression"
        raise ModelError(
            f"{config.name_or_path or 'the model'}: expected a classifier of at least 2 exclusive labels, found {config.num_labels} ({kind})"
            + ("; give --task multi-label-classification" if kind.startswith("multi") else "")
        )
    return int(config.num_labels)


def class_metrics(predictions: Predictions, num_classes: int) -> dict[str, float]:
    """Return accuracy, macro-F1, loss and calibration over the labelled rows."""
    known = predictions.labels != NO_LABEL
    correct = predictions.predicted[known] == predictions.labels[known]
    return {
        "accuracy": accuracy(predictions.labels, predictions.predicted),
        "macro_f1": macro_f1(predictions.labels, predictions.predicted, num_classes=num_classes),
        "loss": mean_nll(predictions.nll),
        "ece": expected_calibration_error(predictions.confidence[known], correct),
    }


def right_answers(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Return (R,) 1.0 for correct rows, and (R,) 1.0 for labelled rows; else 0.0."""
    known = predictions.labels != NO_LABEL
    return (predictions.predicted == predictions.labels).astype(np.float64), known.astype(np.float64)
