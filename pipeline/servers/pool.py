"""The servers of one client: choice of the next server, and pauses after failures."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx2

logger = logging.getLogger(__name__)

#: Seconds before a request is retried, or a failed server is used again: the first wait, which
#: doubles with each failure, and the last.
FIRST_WAIT, LAST_WAIT = 0.25, 30.0
#: Consecutive failures of a server before a warning; an unreachable one is logged immediately.
_MOST_FAILURES = 4


@dataclass(slots=True, eq=False)
class Server:
    """The client's state of one server; used under the lock of the client."""

    url: str
    http: httpx2.Client
    in_flight: int = 0
    sent: int = 0
    """Number of requests so far."""
    failures: int = 0
    """Number of consecutive failures, of any requests."""
    not_before: float = 0.0
    """After a failure: not used before this time while another server is available."""
    logged: bool = False

    def is_usable(self, now: float) -> bool:
        """Return whether the server may be used.

        After a failure, only one request at a time tests whether it answers again.
        """
        return now >= self.not_before and not (self.failures and self.in_flight)

    def failed(self, said: str, patience: float, *, at_once: bool, retry_after: float) -> None:
        """Record a failed request.

        Args:
            at_once: log a warning at the first failure.
        """
        now = time.monotonic()
        if now >= self.not_before:  # count concurrent failures once
            self.not_before = now + max(wait_after(self.failures), retry_after)
            self.failures += 1
        if not self.logged and (at_once or self.failures >= _MOST_FAILURES):
            self.logged = True
            logger.warning("%s; retrying for %.3g s", said, patience)

    def answered(self) -> None:
        """Record an answered request."""
        if self.logged:
            logger.warning("%s: answers again", self.url)
        self.failures, self.not_before, self.logged = 0, 0.0, False


def wait_after(failures: int) -> float:
    """Return the seconds to wait after the given number of earlier failures."""
    return min(LAST_WAIT, FIRST_WAIT * 2.0 ** min(failures, 20))


def choose(servers: Sequence[Server], asked: Mapping[Server, int]) -> Server:
    """Return the usable server with the fewest requests in flight, else the first to be usable.

    Args:
        asked: number of failed attempts of this request per server; servers with fewer come first.
    """
    now = time.monotonic()
    return min(
        servers,
        key=lambda each: (
            not each.is_usable(now),
            asked.get(each, 0),
            max(each.not_before - now, 0.0),
            each.in_flight,
            each.sent,
        ),
    )
