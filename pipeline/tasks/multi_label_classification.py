"""Multi-label classification: one position for each label, with the two classes "no" and "yes".

N is the number of labels; V = 2. A label's logit z becomes the distribution softmax(0, z) over "no"
and "yes"; the probability of "yes" is sigmoid(z). So the cross-entropy is binary cross-entropy, and
the soft term is the binary KL of each label, times T^2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ModelError
from pipeline.metrics import accuracy, label_scores, mean_nll
from pipeline.records import (
    NO_LABEL,
    Example,
    LabelNames,
    LabelSource,
    Predictions,
)
from pipeline.tasks.whole_texts import TextTask

_USAGE = """```python
from transformers import pipeline

label = pipeline("{tag}", model="{folder}", top_k=None)  # a probability for each label
print(label("a text", truncation=True, max_length={max_length}))
```
"""


@dataclass(frozen=True, slots=True)
class MultiLabelClassification(TextTask):
    """Classifiers with several labels at once; see `Task`."""

    name: str = "multi-label-classification"
    usage: str = _USAGE
    label_source: LabelSource = "positions"
    names: LabelNames | None = "positions"
    problem_type: str | None = "multi_label_classification"
    main_metric: str = "f1"

    def num_classes(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return 2: a row has a label or not."""
        config: Any = model.config
        if config.problem_type not in (None, self.problem_type):
            raise ModelError(
                f"{config.name_or_path or 'the model'}: expected a classifier of several labels at once, found {config.problem_type}"
            )
        return 2

    def labels_of(self, example: Example) -> Mapping[str, Any]:
        """Return 1 for each label that a row has, 0 for the others, -100 where it is not known."""
        return {} if example.flags is None else {"labels": np.asarray(example.flags, dtype=np.int32)}

    def at_positions(self, logits: Tensor, supervised: Tensor | None) -> Tensor:
        """Return (N, 2) logits, 0 and the label's logit, from (B, labels) logits."""
        flat = logits.flatten()
        return torch.stack([torch.zeros_like(flat), flat], -1)

    def metrics(self, predictions: Predictions, num_classes: int) -> dict[str, float]:
        """Return micro and macro F1, average precision, accuracy, loss and calibration.

        Accuracy is over single labels. Unknown labels are left out.
        """
        right, found, true = _counts(predictions).sum(0).tolist()
        scores = label_scores(
            *_by_label(predictions, predictions.labels, _share_of_yes(predictions)),
        )
        return {
            "f1": 2 * right / (found + true) if found + true else float("nan"),
            "macro_f1": scores.macro_f1,
            "average_precision": scores.average_precision,
            "accuracy": accuracy(predictions.labels, predictions.predicted),
            "loss": mean_nll(predictions.nll),
            "ece": scores.calibration_error,
        }

    def row_scores(self, predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """Return (R,) twice the correct labels, and (R,) predicted plus true labels.

        The ratio of their totals is micro F1.
        """
        counts = _counts(predictions).astype(np.float64)
        return 2 * counts[:, 0], counts[:, 1] + counts[:, 2]


def _counts(predictions: Predictions) -> np.ndarray:
    """Return (R, 3) numbers of correct, predicted and true labels, without unknown ones."""
    known = predictions.labels != NO_LABEL
    found, true = (known & (values == 1) for values in (predictions.predicted, predictions.labels))
    rows = len(predictions.row_text_bytes)
    parts = [np.bincount(predictions.rows[each], minlength=rows) for each in (found & true, found, true)]
    return np.stack(parts, 1)


def _share_of_yes(predictions: Predictions) -> np.ndarray:
    """Return the (N,) probability that the row has the label; nan where it is not known."""
    confidence = predictions.confidence
    return np.where(predictions.predicted == 1, confidence, 1 - confidence)


def _by_label(predictions: Predictions, *values: np.ndarray) -> list[np.ndarray]:
    """Reshape (N,) values to (R, labels)."""
    count = 1 if predictions.label_names is None else len(predictions.label_names)
    return [each.reshape(-1, count) for each in values]
