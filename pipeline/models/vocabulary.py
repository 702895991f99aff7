"""Convert a model to another tokenizer: special token ids, and rows of embedding and head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import MisuseError, ModelError
from pipeline.records import Ragged

#: The files that tokenizers save in a model's directory.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True, slots=True)
class NewVocabulary:
    """A tokenizer that is not the teacher's, and the relation of its tokens to the teacher's."""

    tokenizer: PreTrainedTokenizerBase
    counterpart: Callable[[int], int | None]
    """Maps a special token of the teacher to the student's; None: it has none."""
    sources: Ragged | None = None
    """For each token, the teacher's tokens whose rows are averaged for its own row; without any,
    the mean of all rows is used. None: not needed, since all weights are random."""
    num_copied: int = 0
    """Number of tokens that the teacher has too."""

    @property
    def size(self) -> int:
        """Rows of the embedding: the largest id + 1, at least the tokenizer's length."""
        return max(len(self.tokenizer), 1 + max(self.tokenizer.get_vocab().values()))

    @property
    def num_unknown(self) -> int:
        """Number of tokens for which no token of the teacher can be used."""
        return 0 if self.sources is None else self.size - int(np.count_nonzero(self.sources.counts))

    @property
    def num_averaged(self) -> int:
        """Number of tokens whose row is a mean over the teacher's tokens."""
        return 0 if self.sources is None else self.size - self.num_copied - self.num_unknown


def with_vocabulary(config: Any, vocabulary: NewVocabulary) -> PreTrainedConfig:
    """Return a copy of a configuration with the new vocabulary's size and special tokens.

    Ids in the configuration (BOS, EOS, padding and others) become those of their counterparts. An
    id without a counterpart becomes that of the same role in the new tokenizer, or None.
    """
    changed: Any = copy.deepcopy(config)
    text = changed.get_text_config()
    for part in (changed,) if text is changed else (changed, text):
        if hasattr(part, "vocab_size"):
            part.vocab_size = vocabulary.size
        for name in [name for name in part.to_dict() if name.endswith("_token_id")]:
            setattr(part, name, _translated(name, getattr(part, name), vocabulary))
    result: PreTrainedConfig = changed
    return result


def _translated(name: str, value: Any, vocabulary: NewVocabulary) -> Any:
    if value is None:
        return None
    ids = [i for i in (value if isinstance(value, list) else [value]) if i >= 0]  # -1: none, in old configurations
    known = list(dict.fromkeys(found for i in ids if (found := vocabulary.counterpart(i)) is not None))
    if not known:
        return getattr(vocabulary.tokenizer, name, None)
    return known if isinstance(value, list) else known[0]


def check_vocabulary(config: Any, vocabulary: NewVocabulary | None) -> None:
    """Refuse a complete configuration whose vocabulary is too small for the tokenizer.

    Raises:
        MisuseError: it is too small.
    """
    found = int(config.get_text_config().vocab_size)
    if vocabulary is not None and found < vocabulary.size:
        raise MisuseError(
            f"config: expected a vocab_size of at least {vocabulary.size}, as the tokenizer has tokens, found {found}"
        )


def rows_of_vocabulary(teacher: PreTrainedModel, vocabulary: NewVocabulary, config: Any) -> dict[str, Tensor]:
    """Return embedding and head of a new vocabulary, by their names in the teacher's state dict.

    Tied weights are returned under each name. A token that the teacher has too keeps its row.
    Another token starts with the mean of the rows of the teacher's tokens that its bytes consist
    of. This heuristic gives a starting point for training only (Gee et al. 2022, "Fast Vocabulary
    Transfer for Language Model Compression").

    Position embeddings that are counted from the padding id (RoBERTa) are shifted with it.

    Args:
        config: the student's configuration, from `with_vocabulary`.

    Returns:
        Name -> (size, D), or (size,) for a bias, in the teacher's dtype.
    """
    embedding: Any = teacher.get_input_embeddings()
    head: Any = teacher.get_output_embeddings()
    parts = [embedding.weight, *([] if head is None else [head.weight, getattr(head, "bias", None)])]
    places = {part.data_ptr() for part in parts if part is not None}
    rows = {
        name: _mean_rows(tensor, vocabulary)
        for name, tensor in teacher.state_dict().items()
        if tensor.data_ptr() in places and len(tensor) == len(embedding.weight)
    }
    return rows | _moved_positions(teacher, (config.pad_token_id or 0) - (teacher.config.pad_token_id or 0))


def _moved_positions(teacher: PreTrainedModel, shift: int) -> dict[str, Tensor]:
    positions = {
        name: module
        for name, module in teacher.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    }
    return {f"{name}.weight": torch.roll(module.weight.detach(), shift, 0) for name, module in positions.items()}


def _mean_rows(weight: Tensor, vocabulary: NewVocabulary) -> Tensor:
    sources = vocabulary.sources
    assert sources is not None
    owners = np.repeat(np.arange(len(sources.counts)), sources.counts)
    known = sources.values < len(weight)  # a tokenizer may have more tokens than its model has rows
    owner, value = (torch.from_numpy(a[known].astype(np.int64)).to(weight.device) for a in (owners, sources.values))
    rows = weight.float()
    total = torch.zeros((vocabulary.size, *rows.shape[1:]), device=weight.device).index_add_(0, owner, rows[value])
    counts = torch.bincount(owner, minlength=vocabulary.size)
    total /= counts.clamp(min=1).view(-1, *[1] * (rows.dim() - 1))
    total[counts == 0] = rows.mean(0)
    return total.to(weight.dtype)


def check_shapes(student: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Refuse an architecture with more weights that depend on the size of the vocabulary.

    Raises:
        ModelError: names one of them.
    """
    for name, tensor in student.state_dict().items():
        if name in weights and weights[name].shape != tensor.shape:
            raise ModelError(
                f"{type(student).__name__}: {name} depends on the vocabulary beside embedding and head, so that layers cannot be copied for another "
                "tokenizer; use --num-layers, --hidden-size, --num-heads"
            )
