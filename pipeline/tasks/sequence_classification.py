"""Sequence classification: one class for a text or a pair of texts.

N = 1 position per row; V is the number of labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from pipeline.errors import MisuseError
from pipeline.records import (
    Columns,
    Example,
    Predictions,
    Tokenization,
)
from pipeline.tasks.one_label import class_metrics, num_labels, right_answers
from pipeline.tasks.protocol import refuse_settings_of_language_models
from pipeline.tasks.whole_texts import TextTask

_USAGE = """```python
from transformers import pipeline

classify = pipeline("{tag}", model="{folder}")
print(classify("a text", truncation=True, max_length={max_length}))
```
"""


@dataclass(frozen=True, slots=True)
class SequenceClassification(TextTask):
    """Classification of texts and pairs of texts; see `Task`."""

    name: str = "sequence-classification"
    usage: str = _USAGE
    judged_by: str | None = "causal-lm"
    main_metric: str = "accuracy"

    def check_columns(self, columns: Columns, tokenization: Tokenization) -> None:
        """Accept only texts and pairs of texts."""
        if columns.words is not None:
            raise MisuseError(
                f"--words-column has a label for each word; --task {self.name} has one a row; for words give --task token-classification"
            )
        if columns.text is None:
            raise MisuseError(
                f"--task {self.name} reads --text-column (and --text-pair-column); chats, prompts and token ids are for causal-lm"
            )
        refuse_settings_of_language_models(self.name, tokenization, "texts, and keeps their beginning")

    def num_classes(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return the number of labels; `ModelError` for regressions and multi-label classifiers."""
        return num_labels(model)

    def labels_of(self, example: Example) -> Mapping[str, Any]:
        """Return the class of the row.

        Raises:
            MisuseError: the label column holds spans of the text.
        """
        if example.word_labels is not None:
            raise MisuseError(
                f"--task {self.name} has one label a row, and --label-column holds spans of the text; for these give --task token-classification"
            )
        return {"label": example.label}

    def metrics(self, predictions: Predictions, num_classes: int) -> dict[str, float]:
        """Return accuracy, macro-F1, loss and calibration over the labelled rows."""
        return class_metrics(predictions, num_classes)

    def row_scores(self, predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """Return (R,) correct answers and (R,) labelled rows; the ratio of totals is accuracy."""
        return right_answers(predictions)
