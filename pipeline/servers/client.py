"""Requests to inference servers: several at once, to the least busy server, again where one fails for a while."""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import httpx2
from pydantic_core import from_json

from pipeline.errors import ServerError
from pipeline.servers.addresses import KEY_VARIABLE, is_loopback
from pipeline.servers.answers import (
    Fault,
    RefusedError,
    UnusableAnswerError,
    fault_of_answer,
    fault_of_exception,
)
from pipeline.servers.pace import MOST, Pace

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

#: Seconds before a request is sent again: doubled with each failure, from the first to the last.
_FIRST_WAIT, _LAST_WAIT = 0.25, 30.0
#: How often a request is sent whose answers cannot be used, and one that fails while others are answered.
_TRIES, _TRIES_ALONE = 4, 8
_CONNECT_SECONDS = 10.0
#: Seconds without a byte after which an answer is given up and asked for again, at most.
_READ_SECONDS = 300.0


@dataclass(slots=True)
class _Server:
    """One server as the client sees it."""

    url: str
    http: httpx2.Client
    in_flight: int = 0
    answers: int = 0
    failures: int = 0
    """In a row."""
    not_before: float = 0.0
    """It is down: no request before this time."""


@dataclass(slots=True)
class _Task(Generic[Answer]):
    path: str
    content: bytes
    read: Callable[[Any], Answer]
    what: str
    size: int
    only: _Server | None
    future: Future[Answer] = field(default_factory=Future)


class Client:
    """A client of one or several servers with the same model; `submit` may be called from any thread.

    Each request is sent to the server with the fewest requests in flight. It is sent again after a growing wait where a
    server is unreachable, slow, overloaded (429, 503) or fails (5xx), until `patience` seconds have gone by since its
    first failure. The key is read from the environment by the caller and stands in no message.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        key: str | None = None,
        concurrency: int | None = None,
        patience: float = 600.0,
        read_seconds: float | None = None,
    ) -> None:
        """Open no connection yet.

        Args:
            urls: root addresses, as `addresses.base_urls` gives them.
            concurrency: requests in flight at most, to all servers; None: found out.
            patience: seconds for which a request is sent again.
            read_seconds: without a byte, after which an answer is given up; default: half of the patience, at most 300.
        """
        wait = read_seconds if read_seconds is not None else min(_READ_SECONDS, max(1.0, patience / 2))
        headers = {"Accept": "application/json", **({} if key is None else {"Authorization": f"Bearer {key}"})}
        self.patience = patience
        self._servers = [
            _Server(
                url,
                httpx2.Client(
                    base_url=url,
                    headers=headers,
                    timeout=httpx2.Timeout(wait, connect=min(_CONNECT_SECONDS, wait), pool=None),
                    limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
                    trust_env=not is_loopback(url),
                ),
            )
            for url in urls
        ]
        self._key = key
        self._pace = Pace(concurrency, len(urls))
        self._changed = threading.Condition()
        self._tasks: deque[_Task[Any]] = deque()
        self._running = self._pausing = self._threads = 0
        self._closed = False

    @property
    def urls(self) -> tuple[str, ...]:
        """The root addresses."""
        return tuple(server.url for server in self._servers)

    @property
    def concurrency(self) -> int:
        """Requests in flight at most, as of now."""
        return self._pace.limit

    @property
    def waiting(self) -> int:
        """Requests that are to be sent, or sent again."""
        with self._changed:
            return len(self._tasks) + self._pausing

    @property
    def busy(self) -> bool:
        """Whether as many requests wait as may be in flight: more would only take memory."""
        return self.waiting >= self.concurrency

    def get(self, path: str, url: str | None = None) -> Any:
        """The JSON that a server gives for a path; None where it has no such path (404).

        Args:
            url: which server; default: the first.

        Raises:
            ServerError: it refuses, or cannot be reached for as long as the patience lasts.
        """
        server = next(server for server in self._servers if url in (None, server.url))
        return self._persist(None, path, f"{server.url}{path}", lambda answer: answer, server)

    def submit(
        self,
        path: str,
        body: Mapping[str, Any],
        read: Callable[[Any], Answer],
        *,
        what: str,
        size: int = 1,
        url: str | None = None,
    ) -> Future[Answer]:
        """Post a request; it is sent when fewer than `concurrency` are in flight.

        Args:
            read: makes the result of the JSON that came, in another thread; raises `UnusableAnswerError` for an answer
                that is to be asked for again.
            what: names the request in messages: "train row 7".
            size: in tokens; throughput is measured in it.
            url: which server; default: the least busy.

        Returns:
            A future of what `read` gives. It raises `RefusedError` where the server refuses this very request (4xx, or
            5xx while others are answered), and `ServerError` where no server can be used.
        """
        only = None if url is None else next(server for server in self._servers if server.url == url)
        task = _Task(path, json.dumps(body).encode(), read, what, size, only)
        with self._changed:
            if self._closed:
                raise RuntimeError("the client is closed")
            self._tasks.append(task)
            self._start_threads()
            self._changed.notify()
        return task.future

    def close(self) -> None:
        """Give up every request that has no answer yet, and close the connections."""
        with self._changed:
            self._closed = True
            for task in self._tasks:
                task.future.cancel()
            self._tasks.clear()
            self._changed.notify_all()
        for server in self._servers:
            server.http.close()

    # ------------------------------------------------------------------------------------------------- the requests

    def _start_threads(self) -> None:
        """As many as may have a request in flight, beside those that pause."""
        wanted = self._pausing + min(self._pace.limit, self._running + len(self._tasks))
        while self._threads < min(wanted, MOST):
            self._threads += 1
            threading.Thread(target=self._work, name="server-request", daemon=True).start()

    def _work(self) -> None:
        while (task := self._next()) is not None:
            try:
                result = self._persist(task.content, task.path, task.what, task.read, task.only, size=task.size)
            except BaseException as error:
                task.future.set_exception(error)
            else:
                task.future.set_result(result)

    def _next(self) -> _Task[Any] | None:
        with self._changed:
            while not (self._tasks and self._running < self._pace.limit):
                if self._closed:
                    return None
                self._changed.wait()
            return self._tasks.popleft()

    def _persist(
        self,
        content: bytes | None,
        path: str,
        what: str,
        read: Callable[[Any], Answer],
        only: _Server | None = None,
        *,
        size: int = 1,
    ) -> Answer:
        """Send a request until it is answered, refused, or patience ends."""
        first_failure: float | None = None
        failed_alone, unusable, answers = 0, 0, self._answers()
        for attempt in range(1 << 30):
            server = only or self._least_busy()
            try:
                return self._send(server, content, path, read, size)
            except UnusableAnswerError as error:
                unusable += 1
                fault = Fault(f"{server.url}: {what}: {error}")
                if unusable >= _TRIES:
                    raise (RefusedError if error.of_row else ServerError)(
                        self._redacted(f"{fault.said}; asked {unusable} times")
                    ) from None
            except (httpx2.HTTPError, RuntimeError) as error:
                if self._closed or not isinstance(error, httpx2.HTTPError):
                    raise ServerError(f"{what}: the client was closed") from None
                fault = fault_of_exception(error, server.url)
            except _AnswerError as answer:
                fault = fault_of_answer(answer.status, answer.body, server.url, what, answer.retry_after)
            if fault.final is not None:
                raise fault.final(self._redacted(fault.said))
            now = time.monotonic()
            first_failure = now if first_failure is None else first_failure
            if fault.is_of_request:
                failed_alone, answers = failed_alone + (self._answers() > answers), self._answers()
                if failed_alone >= _TRIES_ALONE:
                    raise RefusedError(
                        self._redacted(f"{fault.said}; asked {failed_alone} times, while others were answered")
                    )
            if fault.is_of_load:
                with self._changed:
                    self._pace.refused()
            pause = min(_LAST_WAIT, _FIRST_WAIT * 2 ** min(attempt, 20)) * random.uniform(0.75, 1.25)
            pause = max(pause, fault.retry_after)
            if fault.is_down:
                with self._changed:
                    if server.failures == 0:
                        logger.warning("%s; asking again for %.3g s", self._redacted(fault.said), self.patience)
                    if now >= server.not_before:
                        server.not_before = now + min(_LAST_WAIT, _FIRST_WAIT * 2 ** min(server.failures, 20))
                        server.failures += 1
                others = only is None and any(each.not_before <= now for each in self._servers)
                pause = 0.0 if others else pause
            if now + pause - first_failure > self.patience:
                raise ServerError(
                    self._redacted(
                        f"{fault.said}; given up after {self.patience:g} s (--server-patience); what is finished stays: start the server and run the same command again"
                    )
                )
            self._pause(pause)
        raise AssertionError("unreachable")

    def _send(
        self, server: _Server, content: bytes | None, path: str, read: Callable[[Any], Answer], size: int
    ) -> Answer:
        with self._changed:
            while self._running >= self._pace.limit and not self._closed:
                self._changed.wait()
            self._running += 1
            server.in_flight += 1
        answered = False
        try:
            if content is None:
                response = server.http.get(path)
            else:
                response = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
            if content is None and response.status_code == 404:
                return read(None)
            if response.status_code != 200:
                raise _AnswerError(response)
            answered = True
        finally:
            with self._changed:
                self._running -= 1
                server.in_flight -= 1
                if answered and content is not None:
                    self._pace.answered(size, waiting=bool(self._tasks))
                self._start_threads()
                self._changed.notify_all()
        try:
            answer = from_json(response.content, cache_strings="keys")  # twice as fast as json
        except ValueError:
            raise UnusableAnswerError(f"expected JSON, found {response.content[:60]!r}") from None
        try:
            result = read(answer)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise UnusableAnswerError(f"not an answer of this API ({type(error).__name__}: {error})") from None
        with self._changed:
            server.answers += 1
            if server.failures:
                logger.warning("%s: answers again", server.url)
                server.failures, server.not_before = 0, 0.0
        return result

    def _least_busy(self) -> _Server:
        """Of the servers that are not down, else of those whose pause ends first."""
        with self._changed:
            now = time.monotonic()
            return min(self._servers, key=lambda server: (max(server.not_before - now, 0.0), server.in_flight))

    def _answers(self) -> int:
        return sum(server.answers for server in self._servers)

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with self._changed:
            self._pausing += 1
            try:
                self._start_threads()
                while (left := deadline - time.monotonic()) > 0:
                    if self._closed:
                        raise ServerError("the client was closed")
                    self._changed.wait(left)
            finally:
                self._pausing -= 1

    def _redacted(self, text: str) -> str:
        return text if self._key is None else text.replace(self._key, f"${KEY_VARIABLE}")


class _AnswerError(Exception):
    """An answer with another status than 200."""

    def __init__(self, response: httpx2.Response) -> None:
        super().__init__(response.status_code)
        self.status = response.status_code
        self.body = response.content
        self.retry_after = response.headers.get("Retry-After")
