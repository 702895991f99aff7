"""The words of a row whose positions are words, and one of them in its context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.records import TokenizedExample

#: Words that are shown on each side of the one at stake.
_AROUND = 15


def words_of(tokenizer: Any, example: TokenizedExample) -> tuple[str, ...]:
    """(N,) words of a row's positions: as the cache holds them, else decoded from the tokens of each.

    The tokens of a word are those from its position to the next one; special tokens are left out, except that for unknown words.
    """
    if example.words is not None:
        return example.words
    assert example.supervised is not None
    starts = np.flatnonzero(example.supervised).tolist()
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    ids = example.input_ids.tolist()
    pieces = [ids[start:stop] for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return tuple(str(tokenizer.decode([i for i in piece if i not in special])).strip() for piece in pieces)


def in_context(words: Sequence[str], number: int) -> str:
    """One word in brackets, between those beside it: `... lives in [new] york ...`."""
    start, stop = max(0, number - _AROUND), number + _AROUND + 1
    shown = [f"[{word}]" if i == number else word for i, word in enumerate(words[start:stop], start)]
    return " ".join([*["..."] * (start > 0), *shown, *["..."] * (stop < len(words))])
