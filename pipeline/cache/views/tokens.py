"""A row as its tokens, those that are predicted in brackets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_MOST_TOKENS = 80


def marked_tokens(tokenizer: Any, ids: Sequence[int], supervised: np.ndarray | None) -> str:
    """The tokens of a row in one line: `<s> the [cat] [sat]`.

    Args:
        supervised: (T,) bool, the positions with soft labels; each predicts the token after it, which is the one in
            brackets. None: the row has one soft label for the whole of it, and no token is marked.

    Of a long row the 80 tokens from just before the first marked one are shown.
    """
    predicted = np.zeros(len(ids), dtype=bool)
    if supervised is not None:
        predicted[1:] = supervised[:-1]
    first = int(predicted.argmax()) if predicted.any() else 0
    start = max(0, min(first - _MOST_TOKENS // 4, len(ids) - _MOST_TOKENS))
    stop = min(start + _MOST_TOKENS, len(ids))
    found = map(str, tokenizer.convert_ids_to_tokens(list(map(int, ids[start:stop]))))
    names = [name if name.isprintable() else repr(name) for name in found]
    shown = [f"[{name}]" if mark else name for name, mark in zip(names, predicted[start:stop], strict=True)]
    before = [f"... {start} tokens ..."] if start else []
    after = [f"... {len(ids) - stop} tokens ..."] if stop < len(ids) else []
    return " ".join([*before, *shown, *after])
