"""One class for a text or a pair of texts: N = 1 position a row, V = number of labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from pipeline.errors import MisuseError
from pipeline.records import (
    BadRow,
    Columns,
    Encoding,
    Example,
    Full,
    Inputs,
    LabelNames,
    LabelSource,
    OtherTokenizers,
    Predictions,
    TargetKind,
    TokenBlock,
    Tokenization,
    TokenizedExample,
)
from pipeline.tasks.one_label import class_metrics, num_labels, right_answers
from pipeline.tasks.protocol import refuse_settings_of_language_models, token_block
from pipeline.tasks.whole_texts import collate_texts, row_logits, tokenize_texts

_USAGE = """```python
from transformers import pipeline

classify = pipeline("{tag}", model="{folder}")
print(classify("a text", truncation=True, max_length={max_length}))
```
"""


@dataclass(frozen=True, slots=True)
class SequenceClassification:
    """See `Task`."""

    name: str = "sequence-classification"
    reads: Inputs = "tokens"
    auto_class: Any = AutoModelForSequenceClassification
    peft_type: str = "SEQ_CLS"
    hub_category: str = "text-classification"
    usage: str = _USAGE
    marks_positions: bool = False
    label_source: LabelSource = "row"
    names: LabelNames | None = "classes"
    target: TargetKind = "distribution"
    ranks: bool = False
    problem_type: str | None = None
    predicts_tokens: bool = False
    fuses_head: bool = False
    continues_prompts: bool = False
    takes_token_types: bool = True
    stores_text: bool = True
    other_tokenizers: OtherTokenizers = "texts"
    judged_by: str | None = "causal-lm"
    default_encoding: Encoding = Full()
    default_temperature: float = 2.0
    default_max_length: int = 512
    default_batch_tokens: int = 8192
    default_eval_rows: int = 32
    main_metric: str = "accuracy"
    higher_is_better: bool = True

    def check_columns(self, columns: Columns, tokenization: Tokenization) -> None:
        """Only texts and pairs of texts are classified."""
        if columns.words is not None:
            raise MisuseError(
                f"--words-column has a label for each word; --task {self.name} has one a row; for words give --task token-classification"
            )
        if columns.text is None:
            raise MisuseError(
                f"--task {self.name} reads --text-column (and --text-pair-column); chats, prompts and token ids are for causal-lm"
            )
        refuse_settings_of_language_models(self.name, tokenization, "texts, and keeps their beginning")

    def settle(self, settings: Tokenization, tokenizer: PreTrainedTokenizerBase, *, chats: bool) -> Tokenization:
        """As they are: a class is given to a text, not to a chat."""
        return settings

    def num_classes(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
        """The number of labels; one label is a regression, and several at once are not one distribution."""
        return num_labels(model)

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
        return tokenize_texts(examples, tokenizer, settings.max_length, self._label)

    def _label(self, example: Example) -> dict[str, Any]:
        if example.word_labels is not None:
            raise MisuseError(
                f"--task {self.name} has one label a row, and --label-column holds spans of the text; for these give --task token-classification"
            )
        return {"label": example.label}

    def default_positions(self, input_ids: np.ndarray) -> np.ndarray:
        """None: a row marks no tokens."""
        return np.zeros(len(input_ids), dtype=bool)

    def hard_labels(self, rows: TokenBlock | Sequence[TokenizedExample]) -> np.ndarray:
        """(B,): the labels."""
        labels = token_block(rows).label
        assert labels is not None
        return labels

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
        """(B, V): one position a row, as the model gives it for the row alone."""
        return row_logits(model, inputs)

    def at_positions(self, logits: Tensor, supervised: Tensor | None) -> Tensor:
        """(B, V), as they are."""
        return logits

    def metrics(self, predictions: Predictions, num_classes: int) -> dict[str, float]:
        """Accuracy, macro-F1, loss and calibration, over the labelled rows."""
        return class_metrics(predictions, num_classes)

    def row_scores(self, predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """Right answers, and labelled rows."""
        return right_answers(predictions)
