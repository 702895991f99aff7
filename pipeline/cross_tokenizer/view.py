"""A cache in a student's tokens, with the teacher's soft labels and their alignment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from pipeline.cache import Cache, CacheDataset
from pipeline.cross_tokenizer.kept import LISTS, Counts, KeptRows, Maker
from pipeline.records import OwnTokenizer, RowBlock, Shard, VocabularyMap


class RetokenizedDataset(CacheDataset):
    """Rows with the student's tokens, labels and text bytes, and the teacher's soft labels."""

    def __init__(self, kept: KeptRows, shards: tuple[Shard, ...], *, window: int) -> None:
        super().__init__(kept.cache.root, kept.cache.manifest, shards, window=window, remote=kept.cache.remote)
        self.kept = kept

    def num_tokens(self) -> np.ndarray:
        """(rows,) int64: the length of each row in the student's tokens."""
        return self.kept.num_tokens(tuple(dict.fromkeys(name for name, _ in self.groups)))

    def _block(self, group: int, table: pa.Table) -> RowBlock:
        block, kept = super()._block(group, table), self.kept.read(*self.groups[group])
        lists = {**block.lists, **{name: kept.lists[name] for name in LISTS if name in kept.lists}}
        numbers = dict(block.numbers)
        if "text_bytes" in numbers:
            numbers["text_bytes"] = kept.numbers["text_bytes"]
        return RowBlock(block.encoding, block.num_classes, lists, numbers, block.others)


@dataclass(frozen=True)
class RetokenizedCache(Cache):
    """A cache whose rows are in the tokens of a student with another tokenizer.

    Its contract has the student's tokenizer and classes; `as_captured` is the original cache.
    """

    kept: KeptRows | None = None
    prepare: Callable[[], Maker] | None = None
    student_tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def as_captured(self) -> Cache:
        """The original cache, in the teacher's tokens."""
        assert self.kept is not None
        return self.kept.cache

    @property
    def vocabulary_map(self) -> VocabularyMap | None:
        """The map from the teacher's classes to the student's."""
        assert self.kept is not None
        return self.kept.vocabulary_map

    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer."""
        return self.student_tokenizer

    def dataset(self, split: str | Sequence[str], *, window: int = 8) -> CacheDataset:
        """The rows of a split, or of several in sequence; see `Cache.dataset`.

        Alignments that are not stored yet are computed first.
        """
        assert self.kept is not None
        assert self.prepare is not None
        shards = shards_of(self.as_captured, split)
        if missing := self.kept.missing(shards):
            self.prepare().make(self.kept, missing)
        return RetokenizedDataset(self.kept, shards, window=window)


def shards_of(cache: Cache, split: str | Sequence[str]) -> tuple[Shard, ...]:
    """The shards of one or more splits.

    Raises:
        CacheError: a split does not exist.
    """
    cache.dataset(split)  # raises an error that lists the splits
    names = (split,) if isinstance(split, str) else tuple(split)
    return tuple(shard for name in names for shard in cache.manifest.split_shards(name))


def own_tokenizer(caches: Sequence[Cache], split: str | Sequence[str]) -> OwnTokenizer | None:
    """Counts of how student and teacher tokens align in a split; None for one tokenizer."""
    views = [cache for cache in caches if isinstance(cache, RetokenizedCache)]
    if not views:
        return None
    found = Counts()
    for view in views:
        assert view.kept is not None
        found += view.kept.counts(shards_of(view.as_captured, split))
    size = views[0].manifest.contract.tokenizer.vocabulary_size
    return OwnTokenizer(size, found.positions, found.aligned, found.agreeing)


def retokenized(
    cache: Cache, kept: KeptRows, prepare: Callable[[], Maker], tokenizer: PreTrainedTokenizerBase, info: Any
) -> RetokenizedCache:
    """A cache read through stored alignments; `prepare` makes the `Maker` of missing ones."""
    contract = cache.manifest.contract
    settings = dataclasses.replace(contract.tokenization, max_length=kept.max_length)
    changed = dataclasses.replace(
        contract, tokenizer=info, tokenization=settings, num_classes=kept.vocabulary_map.num_classes
    )
    return RetokenizedCache(
        cache.root, dataclasses.replace(cache.manifest, contract=changed), cache.remote, kept, prepare, tokenizer
    )
