"""Which row groups a rank comes to next, so that those behind a URL are fetched before they are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from pipeline.cache import CacheDataset

#: Row groups that are named ahead, those of the batch itself included. When many lanes end
#: together, so many are there already.
_GROUPS = 24


def look_ahead(batches: Iterator[list[int]], dataset: CacheDataset, groups: int = _GROUPS) -> Iterator[list[int]]:
    """The same batches.

    As each is given, `dataset.upcoming` names its new row groups and those of the batches after it,
    `groups` in all.
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
