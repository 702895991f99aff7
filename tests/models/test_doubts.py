from typing import Any

import numpy as np
import pytest

from pipeline.models.doubts import doubts, warn_of_doubts
from pipeline.records import NO_LABEL, Predictions


def predictions(labels: Any, predicted: Any, confidence: float = 0.7) -> Predictions:
    n = len(labels)
    return Predictions(
        labels=np.array(labels),
        predicted=np.array(predicted),
        confidence=np.full(n, confidence),
        nll=np.zeros(n),
        teacher_predicted=np.array(predicted),
        rows=np.arange(n),
        row_kl=np.zeros(n),
        row_text_bytes=np.zeros(n, dtype=np.int64),
    )


@pytest.mark.parametrize(
    ("labels", "predicted", "confidence", "expected"),
    [
        ([0, 0, 0, 1], [0, 0, 0, 0], 0.75, ["75.0% is no better than that of always predicting the most common class"]),
        ([0, 1], [1, 0], 0.0, ["0.0% is no better .* \\(50.0%\\)"]),
        ([0, 0, 0, 1], [0, 0, 0, 1], 1.0, []),
        ([0, 0, 0], [0, 0, 0], 1.0, []),  # one class: no baseline to beat
        ([NO_LABEL] * 3, [0, 0, 0], 1.0, []),
        ([], [], 1.0, []),
        ([0, 1] * 20, [0, 1] * 20, 0.79, ["mean confidence is 79.0% and its accuracy 100.0%"]),
        ([0, 1] * 20, [0, 1] * 20, 0.81, []),
        ([0, 1] * 10, [0, 1] * 10, 0.5, []),  # too few rows to judge
        ([0, 1] * 20, [0, 1] * 20, float("nan"), []),
        ([0, 1] * 20, [0] * 40, 0.99, ["no better than", "mean confidence is 99.0% and its accuracy 50.0%"]),
    ],
)
def test_doubts(labels: Any, predicted: Any, confidence: float, expected: list[str], caplog: Any) -> None:
    found = predictions(labels, predicted, confidence)
    warn_of_doubts(found, "teacher", "test")
    assert len(doubts(found)) == len(caplog.messages) == len(expected)
    for message, pattern in zip(caplog.messages, expected, strict=True):
        known = sum(label != NO_LABEL for label in labels)
        assert message.startswith(f"teacher, split test, {known} labelled positions: its ")
        assert pattern.split(" .*")[0].replace("\\", "") in message
