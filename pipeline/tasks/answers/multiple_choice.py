"""Multiple choice: for a text, choose one of several other texts.

N = 1 position per row; V is the largest number of choices of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForMultipleChoice, PreTrainedTokenizerBase

from pipeline.errors import MisuseError
from pipeline.metrics import accuracy, expected_calibration_error, mean_nll
from pipeline.records import (
    NO_LABEL,
    BadRow,
    Columns,
    Cut,
    Example,
    Inputs,
    LabelNames,
    Predictions,
    Ragged,
    TokenBlock,
    Tokenization,
    TokenizedExample,
)
from pipeline.tasks.answers.candidates import ANY_NUMBER, own_logits
from pipeline.tasks.defaults import TaskDefaults
from pipeline.tasks.one_label import right_answers
from pipeline.tasks.protocol import attention_mask, pad, refuse_settings_of_language_models, token_block
from pipeline.tasks.whole_texts import in_chunks, lost_tokens

_USAGE = """```python
import torch
from transformers import AutoModelForMultipleChoice, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForMultipleChoice.from_pretrained("{folder}")
text, choices = "a text", ["one choice", "another"]
inputs = tokenizer([text] * len(choices), choices, truncation=True, max_length={max_length}, padding=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**{{name: tensor[None] for name, tensor in inputs.items()}}).logits[0]
print(choices[int(logits.argmax())])
```
"""
#: Number of examples that are tokenized in one call.
_BATCH = 256


@dataclass(frozen=True, slots=True)
class MultipleChoice(TaskDefaults):
    """Choice of one of several texts; see `Task`."""

    name: str = "multiple-choice"
    reads: Inputs = "choices"
    auto_class: Any = AutoModelForMultipleChoice
    hub_category: str = "multiple-choice"
    usage: str = _USAGE
    names: LabelNames | None = "choices"
    default_eval_rows: int = 16
    main_metric: str = "accuracy"

    def check_columns(self, columns: Columns, tokenization: Tokenization) -> None:
        """Accept only a text with choices."""
        if not columns.choices or columns.text is None:
            raise MisuseError(
                f"--task {self.name} reads --text-column and --choices-column (a list of texts; or the flag once for each choice)"
            )
        refuse_settings_of_language_models(self.name, tokenization, "a text and choices, and keeps their beginning")

    def num_classes(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return `ANY_NUMBER`: the data determines the number of choices."""
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
        """Tokenize the text with each choice as a pair of at most `max_length` tokens.

        Truncation removes tokens from the end of the longer of the two.
        """
        fewest = tokenizer.num_special_tokens_to_add(pair=True) + 2
        if settings.max_length < fewest:
            raise MisuseError(
                f"--max-length {settings.max_length}: expected at least {fewest}, a token of the text, one of a choice and the special ones"
            )

        def tokenized(chunk: Sequence[Example]) -> Iterator[TokenizedExample | BadRow]:
            return _tokenize(chunk, split, tokenizer, settings)

        return in_chunks(tokenized, examples, _BATCH)

    def collate(
        self,
        rows: TokenBlock | Sequence[TokenizedExample],
        pad_id: int,
        length: int | None = None,
        *,
        processor: Any = None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Pad to (B, C, T), where C is the largest number of choices in the batch.

        The mask is (B, V) bool: which choices each row has. A missing choice is filled with the
        tokens of the row's first choice.
        """
        block = token_block(rows)
        assert block.document_lengths is not None
        lengths = block.document_lengths
        has = pad(Ragged.of((lengths.values > 0).astype(np.int64), lengths.counts), 0).bool()  # (B, V)
        counts = has.sum(1)
        there = has[:, : int(counts.max())]
        order = (counts.cumsum(0) - counts)[:, None].expand(there.shape).clone()  # index of each row's first choice
        order[there] = torch.arange(int(counts.sum()))
        sizes = lengths.values[lengths.values > 0].astype(np.int64)
        tokens = Ragged.of(block.input_ids.values, sizes)  # one sequence per choice
        inputs = {"input_ids": pad(tokens, pad_id)[order], "attention_mask": attention_mask(tokens)[order]}
        if block.token_type_ids is not None:
            inputs["token_type_ids"] = pad(Ragged.of(block.token_type_ids.values, sizes), 0)[order]
        return inputs, has

    def gather_logits(self, model: nn.Module, inputs: Mapping[str, Tensor], supervised: Tensor | None) -> Tensor:
        """Return (B, V) logits; `ABSENT` where a row does not have the choice."""
        assert supervised is not None
        return own_logits(model(**inputs).logits, supervised)

    def metrics(self, predictions: Predictions, num_classes: int) -> dict[str, float]:
        """Return accuracy, loss and calibration over the labelled rows."""
        known = predictions.labels != NO_LABEL
        correct = predictions.predicted[known] == predictions.labels[known]
        return {
            "accuracy": accuracy(predictions.labels, predictions.predicted),
            "loss": mean_nll(predictions.nll),
            "ece": expected_calibration_error(predictions.confidence[known], correct),
        }

    def row_scores(self, predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """Return (R,) correct answers and (R,) labelled rows; the ratio of totals is accuracy."""
        return right_answers(predictions)


def _tokenize(
    examples: Sequence[Example], split: str, tokenizer: PreTrainedTokenizerBase, settings: Tokenization
) -> Iterator[TokenizedExample | BadRow]:
    pairs = [
        (example.text or "", choice if example.text_pair is None else f"{example.text_pair} {choice}")
        for example in examples
        for choice in example.choices or ()
    ]
    first, second = [list(side) for side in zip(*pairs, strict=True)]
    encoded = tokenizer(first, second, truncation=True, max_length=settings.max_length, return_attention_mask=False)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    lost = lost_tokens(first, second, lengths, tokenizer, settings.max_length)
    start = 0
    for example in examples:
        stop = start + len(example.choices or ())
        yield _row(example, split, encoded, start, stop, settings.num_choices, sum(lost[start:stop]))
        start = stop


def _row(
    example: Example, split: str, encoded: Mapping[str, Any], start: int, stop: int, most: int | None, lost: int
) -> TokenizedExample | BadRow:
    ids, types = encoded["input_ids"][start:stop], encoded.get("token_type_ids")
    lengths = [len(each) for each in ids]
    if most is not None and len(lengths) > most:
        return BadRow(split, example.source_row, f"expected at most {most} choices, found {len(lengths)}")
    return TokenizedExample(
        source_row=example.source_row,
        piece=0,
        input_ids=np.concatenate([np.asarray(each, dtype=np.int32) for each in ids]),
        token_type_ids=None
        if types is None
        else np.concatenate([np.asarray(each, dtype=np.int32) for each in types[start:stop]]),
        document_lengths=np.array([*lengths, *[0] * ((most or 0) - len(lengths))], dtype=np.int32),
        label=example.label,
        text=example.text,
        text_pair=example.text_pair,
        choices=example.choices,
        kept=example.kept,
        cut=(Cut(example.source_row, lost),) if lost else (),
    )
