"""Sequence-to-sequence language modelling: one position for each token of the target text.

N is the number of target tokens, EOS included. V is the size of the vocabulary; class i is token i.

A row holds the tokens of the source, followed by those of the target. The target positions are
supervised. The prediction at a target position is of the token at that position; the decoder
computes it from the source and the target tokens before it (teacher forcing).
"""

from __future__ import annotations

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
    Example,
    LabelSource,
    Ragged,
    TokenBlock,
    Tokenization,
    TokenizedExample,
)
from pipeline.tasks.protocol import attention_mask, pad, refuse_settings_of_language_models, token_block
from pipeline.tasks.token_heads import TokenTask, decoder_inputs, supervised_logits
from pipeline.tasks.whole_texts import in_chunks

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
class Seq2SeqLM(TokenTask):
    """Encoder-decoder language models; see `Task`."""

    name: str = "seq2seq-lm"
    auto_class: Any = AutoModelForSeq2SeqLM
    peft_type: str | None = "SEQ_2_SEQ_LM"
    hub_category: str = "text2text-generation"
    usage: str = _USAGE
    label_source: LabelSource = "target"
    fuses_head: bool = True
    default_batch_tokens: int = 4096
    default_eval_rows: int = 8

    def check_columns(self, columns: Columns, tokenization: Tokenization) -> None:
        """Accept only source texts with target texts."""
        if columns.prompt is None or columns.completion is None:
            raise MisuseError(
                f"--task {self.name} reads --prompt-column, the source text, and --completion-column, the target text; other inputs are for other tasks"
            )
        refuse_settings_of_language_models(self.name, tokenization, "plain texts, and keeps the beginning of each")

    def settle(self, settings: Tokenization, tokenizer: PreTrainedTokenizerBase, *, chats: bool) -> Tokenization:
        """Return the settings unchanged.

        Raises:
            MisuseError: the prompts are chats, or `max_length` is below 2.
        """
        if chats:
            raise MisuseError(f"--task {self.name} reads plain texts, and the prompts of this data set are chats")
        if settings.max_length < 2:
            raise MisuseError(
                f"--max-length {settings.max_length}: expected 2 or more, a token of the source and one of the target"
            )
        return settings

    def tokenize(
        self,
        examples: Iterable[Example | BadRow],
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: Tokenization,
        *,
        texts: bool = False,
    ) -> Iterator[TokenizedExample | BadRow]:
        """Truncate source and target to half of `max_length`, or more if the other is shorter."""

        def tokenized(chunk: Sequence[Example]) -> Iterator[TokenizedExample | BadRow]:
            pairs = [example.prompt_completion or ("", "") for example in chunk]
            sources = tokenizer([source for source, _ in pairs], verbose=False)["input_ids"]
            targets = tokenizer(text_target=[target for _, target in pairs], verbose=False)["input_ids"]
            for example, source, target in zip(chunk, sources, targets, strict=True):
                yield _row(example, split, source, target, settings.max_length)

        return in_chunks(tokenized, examples, _BATCH)

    def collate(
        self,
        rows: TokenBlock | Sequence[TokenizedExample],
        pad_id: int,
        length: int | None = None,
        *,
        processor: Any = None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Pad sources and targets separately on the right, each to its longest.

        `length`, the length of both together, is not used. The mask is (B, T of the targets).
        """
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
        """Return (N, V) logits; the output matrix is applied to the target tokens only."""
        return supervised_logits(model, decoder_inputs(model, inputs), supervised, use_cache=False)


def _row(example: Example, split: str, source: list[int], target: list[int], longest: int) -> TokenizedExample | BadRow:
    """Make a row; truncation keeps the last token of each part, since it usually is EOS."""
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
