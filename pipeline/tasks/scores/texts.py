"""Scores of texts and pairs of texts: one position per model output, V = 1, in the unit of the data.

Two tasks share the class: regression, with any number of outputs, and ranking, with one output by which the rows of a list are ordered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from pipeline.errors import MisuseError, ModelError
from pipeline.metrics.scores import correlation_influence, pearson, spearman
from pipeline.records import (
    BadRow,
    Columns,
    Encoding,
    Example,
    Inputs,
    LabelNames,
    LabelSource,
    OtherTokenizers,
    Predictions,
    Score,
    TargetKind,
    TokenBlock,
    Tokenization,
    TokenizedExample,
    is_known,
)
from pipeline.tasks.protocol import refuse_settings_of_language_models, token_block
from pipeline.tasks.scores.rankings import ranking_metrics, ranking_scores
from pipeline.tasks.whole_texts import collate_texts, row_logits, tokenize_texts

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
class ScoredTexts:
    """See `Task`. The defaults are those of regression."""

    name: str = "sequence-regression"
    reads: Inputs = "tokens"
    auto_class: Any = AutoModelForSequenceClassification
    peft_type: str = "SEQ_CLS"
    hub_category: str = "text-classification"
    usage: str = _USAGE
    marks_positions: bool = False
    label_source: LabelSource = "positions"
    names: LabelNames | None = "positions"
    target: TargetKind = "score"
    ranks: bool = False
    problem_type: str | None = "regression"
    predicts_tokens: bool = False
    fuses_head: bool = False
    continues_prompts: bool = False
    takes_token_types: bool = True
    stores_text: bool = True
    other_tokenizers: OtherTokenizers = "texts"
    judged_by: str | None = None
    default_encoding: Encoding = Score()
    default_temperature: float = 1.0
    default_max_length: int = 512
    default_batch_tokens: int = 8192
    default_eval_rows: int = 32
    main_metric: str = "pearson"
    higher_is_better: bool = True

    def check_columns(self, columns: Columns, tokenization: Tokenization) -> None:
        """Only texts and pairs of texts are scored."""
        if columns.text is None:
            raise MisuseError(
                f"--task {self.name} reads --text-column (and --text-pair-column); words, chats, prompts and token ids are for other tasks"
            )
        refuse_settings_of_language_models(self.name, tokenization, "texts, and keeps their beginning")

    def settle(self, settings: Tokenization, tokenizer: PreTrainedTokenizerBase, *, chats: bool) -> Tokenization:
        """As they are."""
        return settings

    def num_classes(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
        """1: an output is one number."""
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

    def tokenize(
        self,
        examples: Iterable[Example | BadRow],
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: Tokenization,
        *,
        texts: bool = False,
    ) -> Iterator[TokenizedExample | BadRow]:
        """Texts longer than `max_length` are truncated."""
        return tokenize_texts(examples, tokenizer, settings.max_length, self._labels)

    def _labels(self, example: Example) -> dict[str, Any]:
        return {} if example.scores is None else {"labels": np.asarray(example.scores, dtype=np.float32)}

    def default_positions(self, input_ids: np.ndarray) -> np.ndarray:
        """None: a row marks no tokens."""
        return np.zeros(len(input_ids), dtype=bool)

    def hard_labels(self, rows: TokenBlock | Sequence[TokenizedExample]) -> np.ndarray:
        """(N,) float32: the scores of the data, nan where there is none."""
        labels = token_block(rows).labels
        assert labels is not None
        return labels.values.astype(np.float32)

    def collate(
        self,
        rows: TokenBlock | Sequence[TokenizedExample],
        pad_id: int,
        length: int | None = None,
        *,
        processor: Any = None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Padded on the right."""
        return collate_texts(rows, pad_id, length), None

    def gather_logits(self, model: nn.Module, inputs: Mapping[str, Tensor], supervised: Tensor | None) -> Tensor:
        """(N, 1): the outputs of each row."""
        return self.at_positions(row_logits(model, inputs), None)

    def at_positions(self, logits: Tensor, supervised: Tensor | None) -> Tensor:
        """(B, outputs) -> (N, 1)."""
        return logits.reshape(-1, 1)

    def metrics(self, predictions: Predictions, num_classes: int) -> dict[str, float]:
        """Correlations with the labels (means over outputs) and the mean squared error; rankings first have NDCG@10 and reciprocal rank."""
        pairs = [(truth[is_known(truth)], found[is_known(truth)]) for truth, found in _by_output(predictions)]
        known = is_known(predictions.labels)
        return {
            **(ranking_metrics(predictions) if self.ranks else {}),
            "pearson": _mean_of_known([pearson(*pair) for pair in pairs]),
            "spearman": _mean_of_known([spearman(*pair) for pair in pairs]),
            "mse": float(predictions.nll[known].mean()) if known.any() else float("nan"),
        }

    def row_scores(self, predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """The mean correlation plus each row's influence on it, and 1 for each row with a label; rankings: NDCG@10 of each list."""
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
        for known, influence in each:  # an output with fewer labels counts as much as the others
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
    """Outputs without labels, or whose scores do not vary, are left out."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _by_output(predictions: Predictions) -> list[tuple[np.ndarray, np.ndarray]]:
    """(R,) labels and (R,) scores of each output."""
    count = 1 if predictions.label_names is None else len(predictions.label_names)
    labels, found = (values.reshape(-1, count).T for values in (predictions.labels, predictions.predicted))
    return list(zip(labels, found, strict=True))
