"""Check that the column `text_bytes`, which bits per byte are computed with, fits the tokens."""

from __future__ import annotations

import itertools
import logging

from pipeline.cache import Cache
from pipeline.tasks.pieces import read_vocabulary

logger = logging.getLogger(__name__)

_ROWS = 64
#: Relative: tokens do not show what a normalizer changed or which text an unknown token replaces.
_TOLERANCE = 0.05


def warn_of_text_bytes(cache: Cache, split: str) -> None:
    """Warn if `text_bytes` of the first rows differs from the bytes of their tokens.

    Caches made before `text_bytes` was exact are off by up to a factor of 3 in both directions.
    """
    if "text_bytes" not in cache.manifest.contract.columns:
        return
    vocabulary = read_vocabulary(cache.tokenizer)
    stated = found = 0
    for row in itertools.islice(cache.dataset(split), _ROWS):
        example = row.example
        if example.supervised is not None:
            stated += example.text_bytes
            found += int(vocabulary.bytes_of_ids(example.input_ids)[1:][example.supervised[:-1]].sum())
    if abs(stated - found) > _TOLERANCE * max(found, 1):
        logger.warning(
            "%s: split %s: text_bytes is %d for rows whose tokens have %d bytes (was the cache made by an earlier release?); "
            "bits_per_byte is unreliable: make the cache again",
            *(cache.where, split, stated, found),
        )
