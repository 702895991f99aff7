"""Masked language modelling: one position for each token that the mask hides.

V is the size of the vocabulary; class i is token i.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerBase

from pipeline.errors import MisuseError
from pipeline.records import (
    BadRow,
    Columns,
    Example,
    LabelSource,
    Masking,
    TokenBlock,
    Tokenization,
    TokenizedExample,
)
from pipeline.tasks.masks import draw_mask
from pipeline.tasks.pieces import Vocabulary, read_vocabulary
from pipeline.tasks.protocol import pad, refuse_settings_of_language_models, token_block
from pipeline.tasks.token_heads import TokenTask, supervised_logits
from pipeline.tasks.whole_texts import collate_texts

_USAGE = """```python
from transformers import pipeline

fill = pipeline("fill-mask", model="{folder}")
print(fill(f"a text with a {{fill.tokenizer.mask_token}} in it"))
```
"""


@dataclass(frozen=True, slots=True)
class MaskedLM(TokenTask):
    """Masked language models; see `Task`."""

    name: str = "masked-lm"
    auto_class: Any = AutoModelForMaskedLM
    hub_category: str = "fill-mask"
    usage: str = _USAGE
    label_source: LabelSource = "hidden"
    default_eval_rows: int = 16

    def check_columns(self, columns: Columns, tokenization: Tokenization) -> None:
        """Accept only single texts."""
        if columns.text is None or columns.text_pair is not None:
            raise MisuseError(
                f"--task {self.name} reads --text-column; pairs, words, chats, prompts and token ids are for other tasks"
            )
        refuse_settings_of_language_models(self.name, tokenization, "texts, in pieces of --max-length tokens")

    def settle(self, settings: Tokenization, tokenizer: PreTrainedTokenizerBase, *, chats: bool) -> Tokenization:
        """Return the settings with those of the masks filled in."""
        _mask_id(tokenizer)
        masking = settings.masking or Masking()
        if masking.whole_words and not tokenizer.is_fast:
            raise MisuseError("--whole-words needs a fast tokenizer, which knows the word of each token; leave it out")
        return dataclasses.replace(settings, masking=masking)

    def tokenize(
        self,
        examples: Iterable[Example | BadRow],
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: Tokenization,
        *,
        texts: bool = False,
    ) -> Iterator[TokenizedExample | BadRow]:
        """Divide texts into pieces of at most `max_length` tokens and mask each piece.

        A piece includes the tokenizer's special tokens. It becomes `Masking.copies` rows, each with
        another mask.
        """
        masking = settings.masking or Masking()
        vocabulary = read_vocabulary(tokenizer)
        allowed = np.setdiff1d(np.arange(len(tokenizer)), [*vocabulary.special, tokenizer.unk_token_id or 0])
        room = settings.max_length - len(vocabulary.prefix) - len(vocabulary.suffix)
        if room < 1:
            raise MisuseError(f"--max-length {settings.max_length}: expected more than the tokenizer's special tokens")
        for item in examples:
            if isinstance(item, BadRow):
                yield item
                continue
            rows = list(_rows(item, split, vocabulary, masking, allowed, room, texts=texts))
            yield from rows
            if not rows:
                yield BadRow(split, item.source_row, "expected a token to hide, found none")

    def default_positions(self, input_ids: np.ndarray) -> np.ndarray:
        """Return True for all tokens, for rows that do not state their hidden tokens."""
        return np.ones(len(input_ids), dtype=bool)

    def collate(
        self,
        rows: TokenBlock | Sequence[TokenizedExample],
        pad_id: int,
        length: int | None = None,
        *,
        processor: Any = None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Pad on the right."""
        tokens = token_block(rows)
        assert tokens.supervised is not None
        return collate_texts(tokens, pad_id, length), pad(tokens.supervised, 0, length).bool()

    def gather_logits(self, model: nn.Module, inputs: Mapping[str, Tensor], supervised: Tensor | None) -> Tensor:
        """Return (N, V) logits; the output matrix is applied to the hidden positions only."""
        return supervised_logits(model, inputs, supervised)


def _rows(
    example: Example,
    split: str,
    vocabulary: Vocabulary,
    masking: Masking,
    allowed: np.ndarray,
    room: int,
    *,
    texts: bool,
) -> Iterator[TokenizedExample]:
    """Yield the rows of one text: its pieces, each with several masks."""
    tokenizer, text = vocabulary.tokenizer, example.text or ""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=texts)
    ids = np.asarray(encoded["input_ids"], dtype=np.int32)
    words = encoded.word_ids() if masking.whole_words else None
    before, after = (np.asarray(part, dtype=np.int32) for part in (vocabulary.prefix, vocabulary.suffix))
    for number, start in enumerate(range(0, len(ids), room)):
        part = ids[start : start + room]
        if not np.isin(part, allowed).any():
            continue
        for copy in range(masking.copies):
            piece = number * masking.copies + copy
            hidden, shown = draw_mask(
                part,
                masking,
                mask_id=_mask_id(tokenizer),
                allowed=allowed,
                words=None if words is None else words[start : start + room],
                place=(split, example.source_row, piece),
            )
            if hidden.any():
                yield TokenizedExample(
                    source_row=example.source_row,
                    piece=piece,
                    input_ids=np.concatenate([before, shown, after]),
                    supervised=np.pad(hidden, (len(before), len(after))),
                    labels=part[hidden],
                    text=_covered(text, encoded["offset_mapping"], start, start + room) if texts else None,
                    kept=example.kept,
                )


def _covered(text: str, offsets: Sequence[tuple[int, int]], start: int, stop: int) -> str:
    """Return the text of the tokens `[start, stop)`."""
    last = offsets[min(stop, len(offsets)) - 1][1] if stop < len(offsets) else len(text)
    return text[offsets[start][0] if start else 0 : last]


def _mask_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the mask token.

    Raises:
        MisuseError: the tokenizer has no mask token.
    """
    found: Any = tokenizer.mask_token_id
    if found is None:
        raise MisuseError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: has no mask token; --task masked-lm needs a model trained with one, as BERT"
        )
    return int(found)
