"""Show a row as its tokens, with predicted or labelled ones in brackets, or as its words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.records import TokenizedExample

_MOST_TOKENS = 80
#: Number of words that are shown on each side of the marked one.
_AROUND = 15


def marked_tokens(tokenizer: Any, ids: Sequence[int], supervised: np.ndarray | None, *, follows: bool = True) -> str:
    """Return the tokens of a row in one line: `<s> the [cat] [sat]`.

    Args:
        supervised: (T,) bool, the positions with soft labels, whose predicted tokens are put in
            brackets. None: the row has one soft label for the whole row, and no token is marked.
        follows: whether a position predicts the token after it; else its soft labels are for its
            own token.

    Of a long row, 80 tokens are shown, starting shortly before the first marked one.
    """
    predicted = np.zeros(len(ids), dtype=bool)
    if supervised is not None:
        predicted = np.append(False, supervised[:-1]) if follows else supervised
    first = int(predicted.argmax()) if predicted.any() else 0
    start = max(0, min(first - _MOST_TOKENS // 4, len(ids) - _MOST_TOKENS))
    stop = min(start + _MOST_TOKENS, len(ids))
    found = map(str, tokenizer.convert_ids_to_tokens(list(map(int, ids[start:stop]))))
    names = [name if name.isprintable() else repr(name) for name in found]
    shown = [f"[{name}]" if mark else name for name, mark in zip(names, predicted[start:stop], strict=True)]
    before = [f"... {start} tokens ..."] if start else []
    after = [f"... {len(ids) - stop} tokens ..."] if stop < len(ids) else []
    return " ".join([*before, *shown, *after])


def words_of(tokenizer: Any, example: TokenizedExample) -> tuple[str, ...]:
    """Return the N words of a row's positions, as stored or else decoded from the tokens.

    The tokens of a word reach from its position to the next one. Special tokens other than the
    unknown token are left out.
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
    """Return one word in brackets with its neighbours: `... lives in [new] york ...`."""
    start, stop = max(0, number - _AROUND), number + _AROUND + 1
    shown = [f"[{word}]" if i == number else word for i, word in enumerate(words[start:stop], start)]
    return " ".join([*["..."] * (start > 0), *shown, *["..."] * (stop < len(words))])
