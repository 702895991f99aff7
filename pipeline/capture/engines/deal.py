"""Assignment of shards to workers; the shards of a worker that dies are reassigned."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from pipeline.errors import CacheError
from pipeline.records import ShardPlan

#: Shards per worker: the one in progress, and the next, which is tokenized meanwhile.
_IN_HAND = 2
_ATTEMPTS = 3


class Deal:
    """Assigns shards to workers.

    A shard that is made twice is byte-identical; its receipt makes it count once.
    """

    def __init__(self, shards: Sequence[ShardPlan], workers: int) -> None:
        self._workers = workers
        self._waiting = deque(shard.name for shard in shards)
        self._in_hand: dict[int, list[str]] = {}
        self._losses: Counter[str] = Counter()

    def to(self, worker: int) -> list[str]:
        """Assign shards to a worker and return their names.

        The list is empty if no shards are left or the worker has enough.
        """
        hand = self._in_hand.setdefault(worker, [])
        given: list[str] = []
        while self._waiting and len(hand) < _IN_HAND and (not hand or len(self._waiting) > self._idle):
            given.append(self._waiting.popleft())
            hand.append(given[-1])
        return given

    @property
    def _idle(self) -> int:
        """Number of workers without a shard. Second shards are kept back for them."""
        return self._workers - sum(map(bool, self._in_hand.values()))

    def in_hand(self, worker: int) -> bool:
        """Return whether a worker has shards assigned."""
        return bool(self._in_hand.get(worker))

    def done(self, worker: int, name: str) -> None:
        """Mark a shard as done: its receipt is written."""
        self._in_hand[worker].remove(name)

    def lost(self, worker: int, how: str) -> None:
        """Queue the shards of a dead worker again.

        Raises:
            CacheError: the third worker has died at the same shard, or at the start.
        """
        hand = self._in_hand.pop(worker, [])
        place = hand[0] if hand else "the start"
        self._losses[place] += 1
        if self._losses[place] == _ATTEMPTS:
            raise CacheError(
                f"{_ATTEMPTS} workers have died at {place} ({how}); finished work is kept: run the same command again, without workers to see why"
            )
        self._waiting.extendleft(reversed(hand))

    @property
    def is_over(self) -> bool:
        """Return whether every shard is done."""
        return not self._waiting and not any(self._in_hand.values())
