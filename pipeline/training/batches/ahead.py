"""Announce the row groups that a rank reads next, so that remote ones are fetched in advance."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from pipeline.cache import CacheDataset

#: Number of row groups that are announced in advance, including those of the current batch. It
#: covers many lanes that need a new row group at the same time.
_GROUPS = 24


def look_ahead(batches: Iterator[list[int]], dataset: CacheDataset, groups: int = _GROUPS) -> Iterator[list[int]]:
    """Yield the same batches, and announce the row groups that they need in advance.

    Before each batch, `dataset.upcoming` is set to the new row groups of this batch and of the
    batches after it, about `groups` in all.
    """
    waiting: deque[tuple[list[int], list[int]]] = deque()
    upcoming: dict[int, None] = {}
    reached: set[int] = set()
    while True:
        while len(upcoming) < groups and (batch := next(batches, None)) is not None:
            found = dict.fromkeys(dataset.group_of(max(row, ~row)) for row in batch)
            new = [group for group in found if group not in reached]
            reached.update(new)
            upcoming.update(dict.fromkeys(new))
            waiting.append((batch, new))
        if not waiting:
            return
        batch, new = waiting.popleft()
        dataset.upcoming = tuple(upcoming)
        for group in new:
            del upcoming[group]
        yield batch
