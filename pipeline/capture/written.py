"""Check that token ids written by `softlabel generate` fit another model's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pipeline.errors import ContractError, ModelError
from pipeline.models.fingerprint import tokenizer_info
from pipeline.models.load import load_tokenizer

#: The file that `softlabel generate` writes last, and the directory with its tokenizer, next to it.
_END, _TOKENIZER = "generation.json", "tokenizer"


def check_written_ids(dataset: str, tokenizer: PreTrainedTokenizerBase, reader: str) -> None:
    """Refuse a generated data set whose token ids come from a different tokenizer.

    Args:
        dataset: the value of `--dataset`: the directory of a generated data set, its `data`
            directory or a file in that. Other data sets are accepted.
        tokenizer: tokenizer of the model that will read the ids.
        reader: the model's name, for the message.

    Raises:
        ContractError: the tokenizers map an id to different tokens. Special tokens and chat
            templates may differ.
    """
    path = Path(dataset)
    root = next((each for each in (path, *path.parents[:2]) if (each / _END).is_file()), None)
    if root is None:
        return
    try:
        written = json.loads((root / _END).read_text(encoding="utf-8"))["contract"]["tokenizer"]
        name, size = str(written["sha256"]), int(written["vocabulary_size"])
    except (ValueError, KeyError, TypeError):
        return  # not a record of `softlabel generate`: an ordinary data set
    own = tokenizer_info(tokenizer)
    if name == own.sha256 or _same_tokens(root / _TOKENIZER, tokenizer):
        return
    raise ContractError(
        f"{dataset}: token ids of another tokenizer than that of {reader} (expected {own.vocabulary_size:,} tokens, sha256 "
        f"{own.sha256[:12]}..., found {size:,}, {name[:12]}...): they stand for other texts; let a model with this tokenizer "
        "write, or read the texts with --prompt-column prompt --completion-column completion"
    )


def _same_tokens(path: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether every token has the same id in the tokenizer saved at `path`."""
    if not path.is_dir():
        return False
    try:
        return bool(load_tokenizer(str(path)).get_vocab() == tokenizer.get_vocab())
    except ModelError:
        return False
