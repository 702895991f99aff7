"""One class for a text or a pair of texts: N = 1 position a row, V = number of labels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from pipeline.errors import MisuseError, ModelError
from pipeline.metrics import accuracy, expected_calibration_error, macro_f1, mean_nll
from pipeline.records import (
    NO_LABEL,
    BadRow,
    Columns,
    Cut,
    Encoding,
    Example,
    Full,
    LabelSource,
    OtherTokenizers,
    Predictions,
    TokenBlock,
    Tokenization,
    TokenizedExample,
)
from pipeline.tasks.protocol import attention_mask, embedding_rows, free_pad_id, kept_pad_id, pad, token_block

_BATCH = 1000


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
    auto_class: Any = AutoModelForSequenceClassification
    peft_type: str = "SEQ_CLS"
    hub_category: str = "text-classification"
    usage: str = _USAGE
    marks_positions: bool = False
    label_source: LabelSource = "row"
    names_classes: bool = True
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
        if tokenization.packing:
            raise MisuseError(f"--packing is for language models; --task {self.name} has one text a row")
        chats = tokenization.assistant_turns, tokenization.chat_template_kwargs, tokenization.truncation_side
        if any(chats):
            raise MisuseError(
                "--assistant-turns, --chat-template-kwargs and --truncation-side are for the chats of language models; "
                f"--task {self.name} reads texts, and keeps their beginning"
            )

    def settle(self, settings: Tokenization, tokenizer: PreTrainedTokenizerBase, *, chats: bool) -> Tokenization:
        """As they are: a class is given to a text, not to a chat."""
        return settings

    def num_classes(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
        """The number of labels; one label is a regression, and several at once are not one distribution."""
        config: Any = model.config
        if config.num_labels < 2 or config.problem_type in ("regression", "multi_label_classification"):
            kind = config.problem_type or "regression"
            raise ModelError(
                f"{config.name_or_path or 'the model'}: expected a classifier of at least 2 exclusive labels, found {config.num_labels} ({kind})"
            )
        return int(config.num_labels)

    def tokenize(
        self,
        examples: Iterable[Example | BadRow],
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: Tokenization,
        *,
        texts: bool = False,
    ) -> Iterator[TokenizedExample | BadRow]:
        """Texts longer than `max_length` are truncated, as `transformers` does; each row has its whole text in any case."""
        for chunk in _batched(examples):
            good = [item for item in chunk if isinstance(item, Example)]
            tokens = iter(self._tokenize_texts(good, tokenizer, settings.max_length)) if good else iter(())
            for item in chunk:
                yield item if isinstance(item, BadRow) else next(tokens)

    def _tokenize_texts(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Iterator[TokenizedExample]:
        paired = examples[0].text_pair is not None
        if any(example.word_labels is not None for example in examples):
            raise MisuseError(
                f"--task {self.name} has one label a row, and --label-column holds spans of the text; for these give --task token-classification"
            )
        encoded = tokenizer(
            [e.text or "" for e in examples],
            [e.text_pair or "" for e in examples] if paired else None,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
        )
        types = encoded.get("token_type_ids")
        lengths = [len(ids) for ids in encoded["input_ids"]]
        whole = _whole_lengths(examples, lengths, tokenizer, max_length)
        for i, example in enumerate(examples):
            yield TokenizedExample(
                source_row=example.source_row,
                piece=0,
                input_ids=np.asarray(encoded["input_ids"][i], dtype=np.int32),
                token_type_ids=None if types is None else np.asarray(types[i], dtype=np.int32),
                label=example.label,
                text=example.text,
                text_pair=example.text_pair,
                kept=example.kept,
                cut=(Cut(example.source_row, whole[i] - lengths[i]),) if whole.get(i, 0) > lengths[i] else (),
            )

    def default_positions(self, input_ids: np.ndarray) -> np.ndarray:
        """None: a row marks no tokens."""
        return np.zeros(len(input_ids), dtype=bool)

    def hard_labels(self, rows: TokenBlock | Sequence[TokenizedExample]) -> np.ndarray:
        """(B,): the labels."""
        labels = token_block(rows).label
        assert labels is not None
        return labels

    def collate(
        self, rows: TokenBlock | Sequence[TokenizedExample], pad_id: int, length: int | None = None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Padded on the right."""
        tokens = token_block(rows)
        inputs = {
            "input_ids": pad(tokens.input_ids, pad_id, length),
            "attention_mask": attention_mask(tokens.input_ids, length),
        }
        if tokens.token_type_ids is not None:
            inputs["token_type_ids"] = pad(tokens.token_type_ids, 0, length)
        return inputs, None

    def gather_logits(self, model: nn.Module, inputs: Mapping[str, Tensor], supervised: Tensor | None) -> Tensor:
        """(B, V): one position a row, as the model gives it for the row alone.

        Decoder-only classifiers of `transformers` take the last token that is not `config.pad_token_id`. Padded with that id, a row ends where it
        ends alone. Where the configuration has none, or one without an embedding, the model takes the last token of a row alone; for this one pass
        the configuration gets an id that no row of the batch ends with, and padding is made of it.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        kept = kept_pad_id(model)
        if kept is not None:
            logits: Tensor = model(**{**inputs, "input_ids": ids.masked_fill(~mask, kept)}).logits
            return logits
        last = (mask * torch.arange(ids.shape[1], device=ids.device)).argmax(-1, keepdim=True)  # (B, 1)
        free = free_pad_id(ids.gather(1, last).flatten().tolist(), embedding_rows(model))
        if free is None:  # a batch of more rows than the vocabulary has tokens
            rows = [{name: tensor[i : i + 1] for name, tensor in inputs.items()} for i in range(len(ids))]
            return torch.cat([self.gather_logits(model, row, None) for row in rows])
        config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
        before, config.pad_token_id = config.pad_token_id, free
        try:
            logits = model(**{**inputs, "input_ids": ids.masked_fill(~mask, free)}).logits
        finally:
            config.pad_token_id = before
        return logits

    def metrics(self, predictions: Predictions, num_classes: int) -> dict[str, float]:
        """Accuracy, macro-F1, loss and calibration, over the labelled rows."""
        known = predictions.labels != NO_LABEL
        correct = predictions.predicted[known] == predictions.labels[known]
        return {
            "accuracy": accuracy(predictions.labels, predictions.predicted),
            "macro_f1": macro_f1(predictions.labels, predictions.predicted, num_classes=num_classes),
            "loss": mean_nll(predictions.nll),
            "ece": expected_calibration_error(predictions.confidence[known], correct),
        }

    def row_scores(self, predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """Right answers, and labelled rows."""
        known = predictions.labels != NO_LABEL
        return (predictions.predicted == predictions.labels).astype(np.float64), known.astype(np.float64)


def _whole_lengths(
    examples: Sequence[Example], lengths: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[int, int]:
    """Number of an example -> its tokens before truncation, of those that are as long as is allowed."""
    full = [i for i, length in enumerate(lengths) if length >= max_length]
    if not full:
        return {}
    pairs = [examples[i].text_pair or "" for i in full] if examples[0].text_pair is not None else None
    encoded = tokenizer([examples[i].text or "" for i in full], pairs, truncation=False, verbose=False)
    return {i: len(ids) for i, ids in zip(full, encoded["input_ids"], strict=True)}


def _batched(items: Iterable[Example | BadRow]) -> Iterator[tuple[Example | BadRow, ...]]:
    iterator = iter(items)
    while chunk := tuple(itertools.islice(iterator, _BATCH)):
        yield chunk
