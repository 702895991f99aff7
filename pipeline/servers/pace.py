"""The number of requests in flight.

It grows while that increases the throughput, and shrinks after refusals for load.
"""

from __future__ import annotations

import time
from collections.abc import Callable

#: Maximum number of requests in flight, and the initial number per server.
MOST = 1024
_FIRST = 8
#: A doubled limit is kept if the throughput grows at least by this factor.
_GAIN = 1.1
#: Least seconds, and rounds of requests, over which throughput is measured.
_SECONDS, _ROUNDS = 0.5, 2
#: Refusals within these seconds after another count as one.
_SAME_REFUSAL = 1.0


class Pace:
    """The limit of requests in flight; used under the lock of its client.

    The limit is doubled until the throughput grows by less than a tenth; the last doubling is then
    undone. A refusal for load (429, 503) ends the search and halves the limit. The limit then grows
    by one per round, up to the result of the search, or to just below the limit at the refusal that
    ended it.
    """

    def __init__(self, fixed: int | None, servers: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Initialize the limit.

        Args:
            fixed: the limit; None: search for it.
        """
        self.limit = fixed or min(MOST, _FIRST * servers)
        self._ceiling = fixed or MOST
        self._searching = fixed is None
        self._clock = clock
        self._best = 0.0
        self._refused = -_SAME_REFUSAL
        self._begin_round()

    def _begin_round(self) -> None:
        self._since, self._answers, self._size = self._clock(), 0, 0
        self._full = True

    @property
    def is_found(self) -> bool:
        """Whether the search is over."""
        return not self._searching

    def answered(self, size: int, *, waiting: bool) -> None:
        """Record an answered request.

        Args:
            size: of the request, in tokens.
            waiting: whether more requests were waiting. Otherwise the throughput does not depend on
                the limit and is ignored.
        """
        self._answers += 1
        self._size += size
        self._full = self._full and waiting
        seconds = self._clock() - self._since
        if self._answers < _ROUNDS * self.limit or (self._searching and seconds < _SECONDS):
            return
        speed, full = self._size / max(seconds, 1e-9), self._full
        self._begin_round()
        if not full:
            return
        if not self._searching:
            self.limit = min(self.limit + 1, self._ceiling)
        elif speed < _GAIN * self._best:
            self._searching = False
            self.limit = max(1, self.limit // 2)
            self._ceiling = self.limit
        elif self.limit >= self._ceiling:
            self._searching = False
        else:
            self._best = speed
            self.limit = min(2 * self.limit, self._ceiling)

    def refused(self) -> None:
        """Record that a server refused a request because of its load."""
        now = self._clock()
        if now - self._refused < _SAME_REFUSAL:
            return
        self._refused = now
        if self._searching:
            self._searching = False
            self._ceiling = max(1, self.limit - 1)
        self.limit = max(1, self.limit // 2)
        self._begin_round()
