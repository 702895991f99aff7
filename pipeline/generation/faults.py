"""What is wrong with a completion: empty, cut, with an n-gram loop, or the same as one before."""

from __future__ import annotations

import hashlib

import numpy as np

#: A loop: a run of tokens that repeats one n-gram, of up to so many tokens, so many times and over
#: so many tokens.
_LONGEST_NGRAM, _REPEATS, _FEWEST_TOKENS = 64, 4, 20


def is_repeated(token_ids: np.ndarray) -> bool:
    """Whether some n-gram of up to 64 tokens stands at least 4 times in a row, over at least 20 tokens.

    Args:
        token_ids: (T,) integers.
    """
    for period in range(1, min(_LONGEST_NGRAM, len(token_ids) // _REPEATS) + 1):
        needed = max(_REPEATS * period, _FEWEST_TOKENS) - period
        if longest_run(token_ids[period:] == token_ids[:-period]) >= needed:
            return True
    return False


def longest_run(flags: np.ndarray) -> int:
    """The most True in a row.

    Args:
        flags: (T,) bool.
    """
    stops = np.flatnonzero(~np.concatenate([[False], flags, [False]]))
    return int(np.diff(stops).max() - 1) if len(stops) > 1 else 0


def content_key(content: bytes) -> int:
    """64 bits by which equal contents are known."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, person=b"generated").digest(), "little")
