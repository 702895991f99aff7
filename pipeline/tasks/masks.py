"""Choose which tokens to mask, and their replacements, as BERT does (Devlin et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.records import Masking
from pipeline.softlabels import counter_uniforms

#: Shares of the hidden tokens that are replaced by the mask token and by a random one. The rest
#: keep their token.
MASKED, RANDOM = 0.8, 0.1


def draw_mask(
    ids: np.ndarray,
    masking: Masking,
    *,
    mask_id: int,
    allowed: np.ndarray,
    words: Sequence[int | None] | None,
    place: tuple[str, int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Hide some tokens of a row.

    Args:
        ids: (T,) token ids, without the special tokens around them.
        allowed: token ids that may be hidden, and that may replace a hidden one.
        words: (T,) the word number of each token, to hide whole words; None: hide single tokens.
        place: split, source row and piece; together with the seed they determine the mask.

    Returns:
        (T,) bool, the hidden tokens: `masking.share` of the allowed ones, rounded, and at least one
        if there is any. With whole words, this number is a maximum that only the first may exceed.
        (T,) token ids, with the replacements.
    """
    split, row, piece = place
    positions = np.arange(len(ids))
    order, action, other = (
        counter_uniforms(masking.seed, f"{name}/{split}", row, piece, positions).numpy()
        for name in ("mask-order", "mask-action", "mask-token")
    )
    candidates = np.isin(ids, allowed)
    count = max(1, round(masking.share * int(candidates.sum())))
    hidden = np.zeros(len(ids), dtype=bool)
    if words is None:
        ranked = np.flatnonzero(candidates)[np.argsort(order[candidates], kind="stable")]
        hidden[ranked[:count]] = True
    else:
        for members in _words(words, candidates, order):
            if hidden.sum() >= count:
                break
            if not hidden.any() or hidden.sum() + len(members) <= count:
                hidden[members] = True
    shown = ids.copy()
    shown[hidden & (action < MASKED)] = mask_id
    random = hidden & (action >= MASKED) & (action < MASKED + RANDOM)
    shown[random] = allowed[(other[random] * len(allowed)).astype(np.int64)]
    return hidden, shown


def _words(words: Sequence[int | None], candidates: np.ndarray, order: np.ndarray) -> list[np.ndarray]:
    """Return the tokens of each word, in random order of words.

    Words with a token that may not be hidden are left out.
    """
    members: dict[int, list[int]] = {}
    for i, word in enumerate(words):
        if word is not None:
            members.setdefault(word, []).append(i)
    whole = [np.array(each) for each in members.values() if candidates[each].all()]
    return sorted(whole, key=lambda each: float(order[each[0]]))
