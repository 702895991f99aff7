"""Which worker makes which shard; the shards of one that died go to another."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from pipeline.errors import CacheError
from pipeline.records import ShardPlan

#: A worker holds the shard that it makes, and the next, which it tokenises meanwhile.
_IN_HAND = 2
_ATTEMPTS = 3


class Deal:
    """Deals shards to workers.

    Exactly-once comes from receipts: a shard that is made twice is the same shard.
    """

    def __init__(self, shards: Sequence[ShardPlan], workers: int) -> None:
        self._workers = workers
        self._waiting = deque(shard.name for shard in shards)
        self._in_hand: dict[int, list[str]] = {}
        self._losses: Counter[str] = Counter()

    def to(self, worker: int) -> list[str]:
        """The names of the shards that a worker is given now; none: there are no more, or its hands are full."""
        hand = self._in_hand.setdefault(worker, [])
        given: list[str] = []
        while self._waiting and len(hand) < _IN_HAND and (not hand or len(self._waiting) > self._idle):
            given.append(self._waiting.popleft())
            hand.append(given[-1])
        return given

    @property
    def _idle(self) -> int:
        """Workers that have nothing to do: a second shard in one's hands would be taken from them."""
        return self._workers - sum(map(bool, self._in_hand.values()))

    def in_hand(self, worker: int) -> bool:
        """Whether a worker has something to do."""
        return bool(self._in_hand.get(worker))

    def done(self, worker: int, name: str) -> None:
        """A shard has its receipt."""
        self._in_hand[worker].remove(name)

    def lost(self, worker: int, how: str) -> None:
        """A worker has died: its shards wait again.

        Raises:
            CacheError: it was the third in the same place.
        """
        hand = self._in_hand.pop(worker, [])
        place = hand[0] if hand else "the start"
        self._losses[place] += 1
        if self._losses[place] == _ATTEMPTS:
            raise CacheError(
                f"{_ATTEMPTS} workers have died at {place} ({how}); what was finished is kept: run the same command again, without workers to see why"
            )
        self._waiting.extendleft(reversed(hand))

    @property
    def is_over(self) -> bool:
        """Whether every shard is made."""
        return not self._waiting and not any(self._in_hand.values())
