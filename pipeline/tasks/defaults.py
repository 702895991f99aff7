"""Defaults for the properties of a task, which tasks inherit and override."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.records import (
    Encoding,
    Full,
    Inputs,
    LabelNames,
    LabelSource,
    OtherTokenizers,
    TargetKind,
    TokenBlock,
    Tokenization,
    TokenizedExample,
)
from pipeline.tasks.protocol import token_block


@dataclass(frozen=True, slots=True)
class TaskDefaults:
    """The properties of an encoder that classifies a text. `Task` documents each of them."""

    name: str
    reads: Inputs = "tokens"
    peft_type: str | None = None
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
    other_tokenizers: OtherTokenizers | None = "texts"
    judged_by: str | None = None
    default_encoding: Encoding = Full()
    default_temperature: float = 2.0
    default_max_length: int = 512
    default_batch_tokens: int = 8192
    default_eval_rows: int = 32
    higher_is_better: bool = True

    def settle(self, settings: Tokenization, tokenizer: PreTrainedTokenizerBase, *, chats: bool) -> Tokenization:
        """Return the settings unchanged."""
        return settings

    def default_positions(self, input_ids: np.ndarray) -> np.ndarray:
        """Return False for all tokens: a row marks no tokens, or states itself which."""
        return np.zeros(len(input_ids), dtype=bool)

    def hard_labels(self, rows: TokenBlock | Sequence[TokenizedExample]) -> np.ndarray:
        """Return (N,) labels: one per row, or one per position, according to `label_source`."""
        block = token_block(rows)
        if self.label_source == "row":
            assert block.label is not None
            return block.label
        assert block.labels is not None
        return block.labels.values.astype(np.float32 if self.target == "score" else np.int64)

    def at_positions(self, logits: Tensor, supervised: Tensor | None) -> Tensor:
        """Return the (N, V) logits unchanged."""
        return logits
