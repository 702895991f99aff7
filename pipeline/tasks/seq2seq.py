"""The target text of an encoder-decoder, token by token: V = vocabulary, class i is token i; N = the tokens of the target, EOS included.

A row holds the tokens of the source and behind them those of the target, whose positions are supervised. The position of a target token
has the prediction of that token, which the decoder makes from the source and the target tokens before it (teacher forcing).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from pipeline.errors import MisuseError
from pipeline.records import (
    NO_LABEL,
    BadRow,
    Columns,
    Cut,
    Encoding,
    Example,
    Inputs,
    LabelNames,
    LabelSource,
    OtherTokenizers,
    Predictions,
    Ragged,
    Sampled,
    TargetKind,
    TokenBlock,
    Tokenization,
    TokenizedExample,
)
from pipeline.tasks.protocol import attention_mask, pad, refuse_settings_of_language_models, token_block
from pipeline.tasks.token_heads import decoder_inputs, nll_by_group, supervised_logits, token_metrics, vocabulary_size

_BATCH = 1000
_USAGE = """```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForSeq2SeqLM.from_pretrained("{folder}")
inputs = tokenizer("A text", truncation=True, max_length={max_length}, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0], skip_special_tokens=True))
```
"""


@dataclass(frozen=True, slots=True)
class Seq2SeqLM:
    """See `Task`."""

    name: str = "seq2seq-lm"
    reads: Inputs = "tokens"
    auto_class: Any = AutoModelForSeq2SeqLM
    peft_type: str | None = "SEQ_2_SEQ_LM"
    hub_category: str = "text2text-generation"
    usage: str = _USAGE
    marks_positions: bool = True
    label_source: LabelSource = "target"
    names: LabelNames | None = None
    target: TargetKind = "distribution"
    ranks: bool = False
    problem_type: str | None = None
    predicts_tokens: bool = True
    fuses_head: bool = True
    continues_prompts: bool = False
    takes_token_types: bool = False
    stores_text: bool = False
    other_tokenizers: OtherTokenizers | None = None
    judged_by: str | None = None
    default_encoding: Encoding = Sampled()
    default_temperature: float = 1.0
    default_max_length: int = 512
    default_batch_tokens: int = 4096
    default_eval_rows: int = 8
    main_metric: str = "loss"
    higher_is_better: bool = False

    def check_columns(self, columns: Columns, tokenization: Tokenization) -> None:
        """Only texts with a target text are read."""
        if columns.prompt is None or columns.completion is None:
            raise MisuseError(
                f"--task {self.name} reads --prompt-column, the source text, and --completion-column, the target text; other inputs are for other tasks"
            )
        refuse_settings_of_language_models(self.name, tokenization, "plain texts, and keeps the beginning of each")

    def settle(self, settings: Tokenization, tokenizer: PreTrainedTokenizerBase, *, chats: bool) -> Tokenization:
        """As they are."""
        if chats:
            raise MisuseError(f"--task {self.name} reads plain texts, and the prompts of this data set are chats")
        if settings.max_length < 2:
            raise MisuseError(
                f"--max-length {settings.max_length}: expected 2 or more, a token of the source and one of the target"
            )
        return settings

    def num_classes(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
        """The tokenizer's vocabulary."""
        return vocabulary_size(model, tokenizer)

    def tokenize(
        self,
        examples: Iterable[Example | BadRow],
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: Tokenization,
        *,
        texts: bool = False,
    ) -> Iterator[TokenizedExample | BadRow]:
        """Source and target are cut to half of `max_length` tokens, or to more where the other needs less."""
        iterator = iter(examples)
        while chunk := tuple(itertools.islice(iterator, _BATCH)):
            pairs = [e.prompt_completion or ("", "") for e in chunk if isinstance(e, Example)]
            sources = iter(tokenizer([source for source, _ in pairs], verbose=False)["input_ids"] if pairs else ())
            targets = iter(tokenizer(text_target=[t for _, t in pairs], verbose=False)["input_ids"] if pairs else ())
            for item in chunk:
                if isinstance(item, BadRow):
                    yield item
                else:
                    yield _row(item, split, next(sources), next(targets), settings.max_length)

    def default_positions(self, input_ids: np.ndarray) -> np.ndarray:
        """None: rows of one's own say which tokens are the target."""
        return np.zeros(len(input_ids), dtype=bool)

    def hard_labels(self, rows: TokenBlock | Sequence[TokenizedExample]) -> np.ndarray:
        """(N,): the tokens of the target."""
        labels = token_block(rows).labels
        assert labels is not None
        return labels.values.astype(np.int64)

    def collate(
        self,
        rows: TokenBlock | Sequence[TokenizedExample],
        pad_id: int,
        length: int | None = None,
        *,
        processor: Any = None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Sources and targets, each padded on the right to its longest; `length` is of both together, and not used."""
        tokens = token_block(rows)
        assert tokens.supervised is not None
        flags = tokens.supervised.values.astype(bool)
        targets = np.add.reduceat(flags.astype(np.int64), tokens.supervised.offsets[:-1])
        source = Ragged.of(tokens.input_ids.values[~flags], tokens.input_ids.counts - targets)
        target = Ragged.of(tokens.input_ids.values[flags], targets)
        inputs = {
            "input_ids": pad(source, pad_id),
            "attention_mask": attention_mask(source),
            "labels": pad(target, NO_LABEL),
        }
        return inputs, inputs["labels"] != NO_LABEL

    def gather_logits(self, model: nn.Module, inputs: Mapping[str, Tensor], supervised: Tensor | None) -> Tensor:
        """The output matrix sees the tokens of the targets only, no padding."""
        return supervised_logits(model, decoder_inputs(model, inputs), supervised, use_cache=False)

    def at_positions(self, logits: Tensor, supervised: Tensor | None) -> Tensor:
        """(B, U, V) -> (N, V)."""
        assert supervised is not None
        return logits[supervised]

    def metrics(self, predictions: Predictions, num_classes: int) -> dict[str, float]:
        """Loss, perplexity, token accuracy and calibration under teacher forcing."""
        return token_metrics(predictions)

    def row_scores(self, predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """Negative log-likelihoods, and positions."""
        return nll_by_group(predictions)


def _row(example: Example, split: str, source: list[int], target: list[int], longest: int) -> TokenizedExample | BadRow:
    """One row; the last token of a part that is cut stays, since tokenizers end texts with EOS."""
    if not source or not target:
        return BadRow(
            split, example.source_row, f"expected tokens, found none of the {'target' if source else 'source'}"
        )
    room_target = min(len(target), max(longest // 2, longest - len(source)))
    room_source = min(len(source), longest - room_target)
    kept_source, kept_target = _cut(source, room_source), _cut(target, room_target)
    lost = len(source) + len(target) - len(kept_source) - len(kept_target)
    return TokenizedExample(
        source_row=example.source_row,
        piece=0,
        input_ids=np.asarray([*kept_source, *kept_target], dtype=np.int32),
        supervised=np.arange(len(kept_source) + len(kept_target)) >= len(kept_source),
        labels=np.asarray(kept_target, dtype=np.int32),
        kept=example.kept,
        cut=(Cut(example.source_row, lost, len(target) - len(kept_target)),) if lost else (),
    )


def _cut(ids: list[int], room: int) -> list[int]:
    return ids if len(ids) <= room else [*ids[: room - 1], ids[-1]]
