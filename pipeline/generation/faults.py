"""Faults of a completion: empty, cut, an n-gram loop, or a duplicate."""

from __future__ import annotations

import hashlib

import numpy as np

#: A loop repeats an n-gram: its largest size, the least number of repeats, and the least number of
#: tokens in total.
_LONGEST_NGRAM, _REPEATS, _FEWEST_TOKENS = 64, 4, 20


def is_repeated(token_ids: np.ndarray) -> bool:
    """Return whether a completion has an n-gram loop.

    A loop is an n-gram of up to 64 tokens that occurs at least 4 times in a row, over at least 20
    tokens.

    Args:
        token_ids: (T,) integers.
    """
    for period in range(1, min(_LONGEST_NGRAM, len(token_ids) // _REPEATS) + 1):
        needed = max(_REPEATS * period, _FEWEST_TOKENS) - period
        if longest_run(token_ids[period:] == token_ids[:-period]) >= needed:
            return True
    return False


def longest_run(flags: np.ndarray) -> int:
    """Return the length of the longest run of True.

    Args:
        flags: (T,) bool.
    """
    stops = np.flatnonzero(~np.concatenate([[False], flags, [False]]))
    return int(np.diff(stops).max() - 1) if len(stops) > 1 else 0


def content_key(content: bytes) -> int:
    """Return a 64-bit hash that identifies equal contents."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, person=b"generated").digest(), "little")
