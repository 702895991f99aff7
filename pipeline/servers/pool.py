"""The servers of one client: which one gets the next request, and which ones are left alone for a while."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx2

logger = logging.getLogger(__name__)

#: Seconds before a request is sent again, or a server is asked again: doubled with each failure,
#: from the first to the last.
FIRST_WAIT, LAST_WAIT = 0.25, 30.0
#: Failures of a server in a row that are logged; one that cannot be reached is logged at once.
_MOST_FAILURES = 4


@dataclass(slots=True, eq=False)
class Server:
    """One server as the client sees it; used under the lock of the client."""

    url: str
    http: httpx2.Client
    in_flight: int = 0
    sent: int = 0
    """Requests so far."""
    failures: int = 0
    """In a row, whatever the request."""
    not_before: float = 0.0
    """It has failed: no request before this time, while another server can be asked."""
    logged: bool = False

    def is_usable(self, now: float) -> bool:
        """Whether it may be asked: after a failure, one request at a time finds out whether it answers again."""
        return now >= self.not_before and not (self.failures and self.in_flight)

    def failed(self, said: str, patience: float, *, at_once: bool, retry_after: float) -> None:
        """It has not answered a request.

        Args:
            at_once: log it at the first failure.
        """
        now = time.monotonic()
        if now >= self.not_before:  # of the requests that were in flight together, the first counts
            self.not_before = now + max(wait_after(self.failures), retry_after)
            self.failures += 1
        if not self.logged and (at_once or self.failures >= _MOST_FAILURES):
            self.logged = True
            logger.warning("%s; asking again for %.3g s", said, patience)

    def answered(self) -> None:
        """It has answered a request."""
        if self.logged:
            logger.warning("%s: answers again", self.url)
        self.failures, self.not_before, self.logged = 0, 0.0, False


def wait_after(failures: int) -> float:
    """Seconds to wait after so many failures before."""
    return min(LAST_WAIT, FIRST_WAIT * 2.0 ** min(failures, 20))


def choose(servers: Sequence[Server], asked: Mapping[Server, int]) -> Server:
    """The usable server with the fewest requests in flight, else the one whose pause ends first.

    Args:
        asked: how often each server has been asked the same request in vain; others come first.
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
