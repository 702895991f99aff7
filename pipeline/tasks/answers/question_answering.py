"""Extractive question answering: find the first and last token of the answer in a text.

N = 2 positions per row, the start and the end of the answer. The classes of both are the places
(indices) of the row's tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerBase

from pipeline.errors import MisuseError, ModelError
from pipeline.metrics import accuracy, mean_nll
from pipeline.metrics.spans import overlap_of_spans
from pipeline.records import (
    NO_LABEL,
    BadRow,
    Columns,
    Encoding,
    Example,
    LabelNames,
    LabelSource,
    OtherTokenizers,
    Predictions,
    Sampled,
    TokenBlock,
    Tokenization,
    TokenizedExample,
)
from pipeline.tasks.answers.candidates import ANY_NUMBER, own_logits
from pipeline.tasks.defaults import TaskDefaults
from pipeline.tasks.protocol import refuse_settings_of_language_models, token_block
from pipeline.tasks.whole_texts import collate_texts

_USAGE = """```python
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForQuestionAnswering.from_pretrained("{folder}")
inputs = tokenizer("who sat?", "the cat sat", truncation="only_second", max_length={max_length}, return_tensors="pt")
found = model(**inputs)
first, last = int(found.start_logits.argmax()), int(found.end_logits.argmax())
print(tokenizer.decode(inputs["input_ids"][0, first : last + 1]))
```
"""
#: Default number of tokens that two consecutive windows of a long text share.
STRIDE = 128


@dataclass(frozen=True, slots=True)
class QuestionAnswering(TaskDefaults):
    """Extractive question answering; see `Task`."""

    name: str = "question-answering"
    auto_class: Any = AutoModelForQuestionAnswering
    peft_type: str | None = "QUESTION_ANS"
    hub_category: str = "question-answering"
    usage: str = _USAGE
    label_source: LabelSource = "positions"
    names: LabelNames | None = "places"
    other_tokenizers: OtherTokenizers | None = None
    default_encoding: Encoding = Sampled()
    default_temperature: float = 1.0
    default_max_length: int = 384
    main_metric: str = "f1"

    def check_columns(self, columns: Columns, tokenization: Tokenization) -> None:
        """Accept only a question with the text that contains its answer."""
        if columns.text is None or columns.text_pair is None:
            raise MisuseError(
                f"--task {self.name} reads the question from --text-column and the text with its answer from --text-pair-column"
            )
        refuse_settings_of_language_models(self.name, tokenization, "questions and texts, in windows")

    def settle(self, settings: Tokenization, tokenizer: PreTrainedTokenizerBase, *, chats: bool) -> Tokenization:
        """Return the settings unchanged.

        Raises:
            MisuseError: the tokenizer is not fast, so that it gives no character offsets.
        """
        if not tokenizer.is_fast:
            raise MisuseError(
                f"--task {self.name} needs a fast tokenizer, which gives the characters of each token; found {type(tokenizer).__name__}"
            )
        return settings

    def num_classes(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return `ANY_NUMBER`: the longest row determines the number of places."""
        return ANY_NUMBER

    def tokenize(
        self,
        examples: Iterable[Example | BadRow],
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: Tokenization,
        *,
        texts: bool = False,
    ) -> Iterator[TokenizedExample | BadRow]:
        """Tokenize the question with each window of the text.

        Consecutive windows share `stride` tokens, as in the examples of `transformers`.
        """
        self.settle(settings, tokenizer, chats=False)
        for item in examples:
            if isinstance(item, BadRow):
                yield item
            else:
                yield from _windows(item, split, tokenizer, settings)

    def collate(
        self,
        rows: TokenBlock | Sequence[TokenizedExample],
        pad_id: int,
        length: int | None = None,
        *,
        processor: Any = None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Pad on the right to (B, T). The mask is (B, V) bool: which places each row has."""
        block = token_block(rows)
        inputs = collate_texts(block, pad_id, length)
        places = torch.arange(max(block.num_classes or 0, inputs["input_ids"].shape[1]))
        return inputs, places < torch.from_numpy(block.input_ids.counts.astype(np.int64))[:, None]

    def gather_logits(self, model: nn.Module, inputs: Mapping[str, Tensor], supervised: Tensor | None) -> Tensor:
        """Return (2B, V) logits: for each row those of the start, then those of the end.

        They are `ABSENT` at places that a row does not have.

        Raises:
            ModelError: the model returns no start and end logits.
        """
        assert supervised is not None
        found = model(**inputs)
        if getattr(found, "end_logits", None) is None:
            raise ModelError(
                f"{type(model).__name__}: expected logits of the first and the last token of an answer, found {', '.join(found)}"
            )
        logits = torch.stack([found.start_logits, found.end_logits], 1)  # (B, 2, T)
        return own_logits(logits, supervised[:, None]).flatten(0, 1)

    def metrics(self, predictions: Predictions, num_classes: int) -> dict[str, float]:
        """Return token F1 and exact match over labelled rows, accuracy and loss over positions."""
        f1, known = self.row_scores(predictions)
        right = (predictions.predicted == predictions.labels).reshape(-1, 2).all(1)
        return {
            "f1": float(f1.sum() / known.sum()) if known.any() else float("nan"),
            "exact": float(right[known > 0].mean()) if known.any() else float("nan"),
            "accuracy": accuracy(predictions.labels, predictions.predicted),
            "loss": mean_nll(predictions.nll),
        }

    def row_scores(self, predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """Return (R,) token F1 of each row's answer, and (R,) 1.0 for labelled rows."""
        labels, predicted = predictions.labels.reshape(-1, 2), predictions.predicted.reshape(-1, 2)
        known = (labels != NO_LABEL).all(1)
        return np.where(known, overlap_of_spans(labels, predicted), 0.0), known.astype(np.float64)


def encode_windows(question: str, text: str, tokenizer: PreTrainedTokenizerBase, settings: Tokenization) -> Any:
    """Encode the question with each window of the text, with `offset_mapping`.

    Returns:
        The encoding of a fast tokenizer, one entry per window; None if the question leaves room for
        fewer than two tokens of the text.
    """
    taken = len(tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"])
    room = settings.max_length - taken - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 2:
        return None
    return tokenizer(
        question,
        text,
        truncation="only_second",
        max_length=settings.max_length,
        stride=min(STRIDE if settings.stride is None else settings.stride, room // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )


def of_text(encoded: Any, number: int) -> list[int]:
    """Return the places of a window whose tokens are of the text."""
    return [place for place, side in enumerate(encoded.sequence_ids(number)) if side == 1]


def _windows(
    example: Example, split: str, tokenizer: PreTrainedTokenizerBase, settings: Tokenization
) -> Iterator[TokenizedExample | BadRow]:
    text = example.text_pair or ""
    encoded = encode_windows(example.text or "", text, tokenizer, settings)
    if encoded is None:
        reason = f"expected a question that leaves room for the text within {settings.max_length} tokens"
        yield BadRow(split, example.source_row, reason)
        return
    count, types = len(encoded["input_ids"]), encoded.get("token_type_ids")
    for number, ids in enumerate(encoded["input_ids"]):
        places, offsets = of_text(encoded, number), encoded["offset_mapping"][number]
        # Characters that a normalizer drops at the ends of the text count to the first and the last
        # window.
        begin = 0 if number == 0 or not places else offsets[places[0]][0]
        end = len(text) if number == count - 1 or not places else offsets[places[-1]][1]
        spans = {place: offsets[place] for place in places}
        yield TokenizedExample(
            source_row=example.source_row,
            piece=number,
            input_ids=np.asarray(ids, dtype=np.int32),
            token_type_ids=None if types is None else np.asarray(types[number], dtype=np.int32),
            labels=_ends(example.answers, spans, (begin, end), _none_at(ids, tokenizer)),
            num_classes=settings.max_length,
            text=example.text,
            text_pair=example.text_pair,
            kept=example.kept,
        )


def _none_at(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the place that represents "no answer": that of the CLS token, or the first."""
    return ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0


def _ends(
    answers: Sequence[tuple[int, int]] | None,
    offsets: Mapping[int, tuple[int, int]],
    window: tuple[int, int],
    none_at: int,
) -> np.ndarray:
    """Return the places of the first and last token of the first answer.

    Args:
        answers: characters `[start, stop)` of each answer; None: not known.
        offsets: character offsets of the tokens of the text, by place.
        window: characters of the text that the window covers.
        none_at: the place that represents "no answer".

    Returns:
        (2,) int32: `none_at` twice if the window does not contain the answer; -100 twice if the
        answers are not known.
    """
    if answers is None:
        return np.full(2, NO_LABEL, dtype=np.int32)
    if answers and window[0] <= answers[0][0] and answers[0][1] <= window[1]:
        start, stop = answers[0]
        inside = [place for place, (first, last) in offsets.items() if first < stop and last > start]
        if inside:
            return np.array([inside[0], inside[-1]], dtype=np.int32)
    return np.array([none_at, none_at], dtype=np.int32)
