"""One score for each row, by which the rows of a list are ranked: the documents of a query, as a cross-encoder reads both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ModelError
from pipeline.metrics.scores import ndcg, reciprocal_rank
from pipeline.records import Predictions, is_known
from pipeline.tasks.sequence_regression import SequenceRegression

_USAGE = """```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("{folder}", max_length={max_length}, activation_fn=None)
print(model.rank("a query", ["a document", "another"]))
```
"""


@dataclass(frozen=True, slots=True)
class TextRanking(SequenceRegression):
    """See `Task`. The scores are those of `SequenceRegression`; what is asked of them is their order."""

    name: str = "text-ranking"
    hub_category: str = "text-ranking"
    usage: str = _USAGE
    ranks: bool = True
    main_metric: str = "ndcg@10"

    def num_classes(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
        """1, and the model has one output."""
        found = SequenceRegression.num_classes(self, model, tokenizer)
        config: Any = model.config
        if config.num_labels != 1:
            raise ModelError(
                f"{config.name_or_path or 'the model'}: expected one output to rank by, found {config.num_labels}"
            )
        return found

    def metrics(self, predictions: Predictions, num_classes: int) -> dict[str, float]:
        """Means over lists with a relevant row: NDCG@10 and the reciprocal rank; and the correlations of all scores with the labels."""
        places = _by_list(predictions)
        return {
            "ndcg@10": _mean_of_known(ndcg(*places)),
            "mrr": _mean_of_known(reciprocal_rank(*places)),
            **SequenceRegression.metrics(self, predictions, num_classes),
        }

    def row_scores(self, predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """(lists,) NDCG@10 and 1, or 0 and 0 for a list without a relevant row."""
        found = ndcg(*_by_list(predictions))
        known = ~np.isnan(found)
        lists = _num_lists(predictions)
        values, weights = np.zeros(lists), np.zeros(lists)
        values[: len(found)][known], weights[: len(found)][known] = found[known], 1.0
        return values, weights


def _mean_of_known(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _num_lists(predictions: Predictions) -> int:
    return 1 + int(_lists(predictions).max(initial=-1))


def _lists(predictions: Predictions) -> np.ndarray:
    """(R,) the list of each row; where none are named, all rows are one."""
    if predictions.groups is None:
        return np.zeros(len(predictions.labels), dtype=np.int64)
    return predictions.groups


def _by_list(predictions: Predictions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores and lists of the rows whose label is known: the others are left out of their lists."""
    known = is_known(predictions.labels)
    return predictions.labels[known], predictions.predicted[known], _lists(predictions)[known]
