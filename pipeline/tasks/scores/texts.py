"""Regression and ranking of texts and pairs of texts.

One position per model output; V = 1, a score in the unit of the data. Two tasks share the class:
regression, with any number of outputs, and ranking, with one output that orders the rows of a list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ModelError
from pipeline.metrics.scores import correlation_influence, pearson, spearman
from pipeline.records import (
    Encoding,
    Example,
    LabelNames,
    LabelSource,
    Predictions,
    Score,
    TargetKind,
    is_known,
)
from pipeline.tasks.scores.rankings import ranking_metrics, ranking_scores
from pipeline.tasks.whole_texts import TextTask

_RANKING_USAGE = """```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("{folder}", max_length={max_length}, activation_fn=None)
print(model.rank("a query", ["a document", "another"]))
```
"""

_USAGE = """```python
from transformers import pipeline

score = pipeline("text-classification", model="{folder}", function_to_apply="none", top_k=None)
print(score("a text", truncation=True, max_length={max_length}))  # of a pair: {{"text": "a text", "text_pair": "another"}}
```
"""


@dataclass(frozen=True, slots=True)
class ScoredTexts(TextTask):
    """Scores of texts; see `Task`. The defaults are those of regression."""

    name: str = "sequence-regression"
    usage: str = _USAGE
    label_source: LabelSource = "positions"
    names: LabelNames | None = "positions"
    target: TargetKind = "score"
    problem_type: str | None = "regression"
    default_encoding: Encoding = Score()
    default_temperature: float = 1.0
    main_metric: str = "pearson"

    def num_classes(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return 1: an output is one number."""
        config: Any = model.config
        if config.problem_type not in (None, self.problem_type):
            raise ModelError(
                f"{config.name_or_path or 'the model'}: expected a model that gives scores (problem_type regression), found {config.problem_type}"
            )
        if self.ranks and config.num_labels != 1:
            raise ModelError(
                f"{config.name_or_path or 'the model'}: expected one output to rank by, found {config.num_labels}"
            )
        return 1

    def labels_of(self, example: Example) -> Mapping[str, Any]:
        """Return the scores of the data, nan where a score is not known."""
        return {} if example.scores is None else {"labels": np.asarray(example.scores, dtype=np.float32)}

    def at_positions(self, logits: Tensor, supervised: Tensor | None) -> Tensor:
        """Reshape (B, outputs) logits to (N, 1)."""
        return logits.reshape(-1, 1)

    def metrics(self, predictions: Predictions, num_classes: int) -> dict[str, float]:
        """Return Pearson and Spearman correlation, means over outputs, and mean squared error.

        For rankings, NDCG@10 and mean reciprocal rank come first.
        """
        pairs = [(truth[is_known(truth)], found[is_known(truth)]) for truth, found in _by_output(predictions)]
        known = is_known(predictions.labels)
        return {
            **(ranking_metrics(predictions) if self.ranks else {}),
            "pearson": _mean_of_known([pearson(*pair) for pair in pairs]),
            "spearman": _mean_of_known([spearman(*pair) for pair in pairs]),
            "mse": float(predictions.nll[known].mean()) if known.any() else float("nan"),
        }

    def row_scores(self, predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean correlation plus each row's influence on it, and 1 for labelled rows.

        For rankings, return NDCG@10 and a weight for each list.
        """
        if self.ranks:
            return ranking_scores(predictions)
        pairs = [(is_known(truth), truth, found) for truth, found in _by_output(predictions)]
        each = [(known, correlation_influence(truth[known], found[known])) for known, truth, found in pairs]
        each = [(known, influence) for known, influence in each if not np.isnan(influence).any() and len(influence)]
        values, labelled = (
            np.zeros(len(predictions.row_text_bytes)),
            np.zeros(len(predictions.row_text_bytes), dtype=bool),
        )
        for known, _ in each:
            labelled |= known
        for known, influence in each:  # every output has the same weight, whatever its number of labels
            values[known] += influence * (labelled.sum() / (len(each) * known.sum()))
        return values, labelled.astype(np.float64)


RANKING = ScoredTexts(
    name="text-ranking",
    hub_category="text-ranking",
    usage=_RANKING_USAGE,
    ranks=True,
    main_metric="ndcg@10",
)


def _mean_of_known(values: Sequence[float]) -> float:
    """Return the mean without nan, the value of outputs without labels or with constant scores."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _by_output(predictions: Predictions) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the (R,) labels and (R,) scores of each output."""
    count = 1 if predictions.label_names is None else len(predictions.label_names)
    labels, found = (values.reshape(-1, count).T for values in (predictions.labels, predictions.predicted))
    return list(zip(labels, found, strict=True))
