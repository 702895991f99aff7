"""Concurrent requests to inference servers, with load balancing and retries.

If a request keeps failing, a control decides whether the request or the server is at fault: the
shortest request that was answered before is sent to the same server. If that is answered, the
request is at fault, otherwise the server is.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import httpx2
from pydantic_core import from_json

from pipeline.errors import ServerError
from pipeline.servers.addresses import KEY_VARIABLE, is_loopback
from pipeline.servers.answers import (
    AnswerError,
    Fault,
    RefusedError,
    UnusableAnswerError,
    fault_of_exception,
)
from pipeline.servers.pace import MOST, Pace
from pipeline.servers.pool import Server, choose, wait_after

Answer = TypeVar("Answer")

#: Attempts of a request with unusable answers; failures of a request before the control is sent,
#: within the patience and at its end. After the control, the request is sent once more.
_TRIES, _TRIES_ALONE, _TRIES_AT_LEAST = 4, 7, 2
_CONNECT_SECONDS = 10.0
#: Seconds to wait for requests in flight when closing.
_CLOSE_SECONDS = 2.0
#: Upper bound of the read timeout in seconds.
_READ_SECONDS = 300.0


@dataclass(slots=True)
class _Task(Generic[Answer]):
    path: str
    content: bytes
    read: Callable[[Any], Answer]
    what: str
    size: int
    only: Server | None
    future: Future[Answer] = field(default_factory=Future)


class Client:
    """A client of one or several servers of the same model; `submit` is thread-safe.

    Each request goes to the server with the fewest requests in flight. If a server is unreachable,
    slow, overloaded (429, 503) or fails (5xx), the request is retried, on another server first,
    with growing waits, until `patience` seconds after its first failure. A failing server is not
    used for a growing time while there is another one. The caller reads the API key from the
    environment; messages never contain it.
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
        """Initialize the client without opening a connection.

        Args:
            urls: root addresses, from `addresses.base_urls`.
            concurrency: maximum number of requests in flight to all servers; None: determined at
                run time.
            patience: seconds during which a request is retried.
            read_seconds: read timeout; default: half of the patience, at most 300.
        """
        wait = read_seconds if read_seconds is not None else min(_READ_SECONDS, max(1.0, patience / 2))
        headers = {"Accept": "application/json", **({} if key is None else {"Authorization": f"Bearer {key}"})}
        self.patience = patience
        self._servers = [
            Server(
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
        self._changed = threading.Condition()  # its lock is reentrant
        self._tasks: deque[_Task[Any]] = deque()
        self._threads: list[threading.Thread] = []
        self._running = self._pausing = 0
        self._closed = False
        self._control: tuple[bytes, str, Callable[[Any], Any]] | None = None

    @property
    def urls(self) -> tuple[str, ...]:
        """The root addresses."""
        return tuple(server.url for server in self._servers)

    @property
    def concurrency(self) -> int:
        """The current maximum number of requests in flight."""
        return self._pace.limit

    @property
    def waiting(self) -> int:
        """Number of requests that wait to be sent or sent again."""
        with self._changed:
            return len(self._tasks) + self._pausing

    @property
    def busy(self) -> bool:
        """Whether as many requests wait as may be in flight; more would only use memory."""
        return self.waiting >= self.concurrency

    def get(self, path: str, url: str | None = None) -> Any:
        """Return the JSON response for a path, or None if the server does not have the path (404).

        Args:
            url: the server; default: the first one.

        Raises:
            ServerError: the server refuses, or cannot be reached within the patience.
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
        """Post a request as soon as fewer than `concurrency` are in flight.

        Args:
            read: converts the JSON response to the result, in another thread; raises
                `UnusableAnswerError` if the request should be retried.
            what: name of the request in messages: "train row 7".
            size: in tokens, to measure throughput.
            url: the server; default: the least busy one.

        Returns:
            A future of the result of `read`. It raises `RefusedError` if a server refuses this
                request (4xx, or repeated 5xx) but answers the control, and `ServerError` if no
                server is available.
        """
        only = None if url is None else next(server for server in self._servers if server.url == url)
        task = _Task(path, json.dumps(body).encode(), read, what, size, only)
        with self._changed:
            if self._closed:
                raise RuntimeError("the client is closed")
            self._tasks.append(task)
            self._start_threads()
            self._changed.notify_all()  # a pausing thread may wake first
        return task.future

    def close(self) -> None:
        """Cancel all pending requests and close the connections."""
        with self._changed:
            self._closed = True
            for task in self._tasks:
                task.future.cancel()
            self._tasks.clear()
            self._changed.notify_all()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:  # they could open connections after `close`
            thread.join(max(0.0, deadline - time.monotonic()))
        for server in self._servers:
            with contextlib.suppress(RuntimeError):  # a request hangs
                server.http.close()

    # ------------------------------------------------------------------------------ the requests

    def _start_threads(self) -> None:
        """Start as many threads as may have a request in flight, in addition to pausing threads."""
        wanted = self._pausing + min(self._pace.limit, self._running + len(self._tasks))
        while len(self._threads) < min(wanted, MOST) and not self._closed:
            self._threads.append(threading.Thread(target=self._work, name="server-request", daemon=True))
            self._threads[-1].start()

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
        only: Server | None = None,
        *,
        size: int = 1,
    ) -> Answer:
        """Send a request until it is answered or refused, or the patience ends."""
        first_failure: float | None = None
        unusable, is_suspect = 0, False
        asked, failed = Counter[Server](), Counter[Server]()
        for attempt in range(1 << 30):
            server = self._taken(only, asked)
            try:
                result = self._send(server, content, path, read, size)
            except UnusableAnswerError as error:
                unusable += 1
                fault = Fault(f"{server.url}: {what}: {error}", is_of_server=not error.of_row)
                if unusable >= _TRIES:
                    final = RefusedError if error.of_row else ServerError
                    fault = Fault(f"{fault.said}; asked {unusable} times", final=final, reason=str(error))
            except httpx2.HTTPError as error:
                fault = fault_of_exception(error, server.url)
            except AnswerError as answer:
                fault = answer.fault(server.url, what)
            else:
                self._remember(content, path, read)
                return result
            if fault.final is not None and fault.final is not RefusedError:
                raise fault.final(self._redacted(fault.said))
            now = time.monotonic()
            first_failure = now if first_failure is None else first_failure
            asked[server] += 1
            failed[server] += fault.is_of_request
            if fault.is_of_server:
                self._failed(server, fault)
            if fault.final is RefusedError and self._answers_control(server, unknown=True):
                raise self._refused(fault)
            pause = max(wait_after(attempt) * random.uniform(0.75, 1.25), fault.retry_after)
            if only is None and self._has_other(asked):
                pause = 0.0
            is_over = now + pause - first_failure > self.patience
            enough = _TRIES_AT_LEAST if is_over else _TRIES_ALONE
            if fault.is_of_request and failed.total() >= enough:
                for each in [each for each in failed if not self._answers_control(each, unknown=False)]:
                    del failed[each]  # the server is at fault
                was_suspect, is_suspect = is_suspect, failed.total() >= enough
                if is_suspect and was_suspect:
                    raise self._refused(fault, f"; asked {sum(asked.values())} times, while others were answered")
                if is_suspect:  # unless the server has just recovered
                    continue
            if is_over:
                raise ServerError(
                    self._redacted(
                        f"{fault.said}; given up after {self.patience:g} s (--server-patience); finished work is kept: start the server and run the same command again"
                    )
                )
            self._pause(pause)
        raise AssertionError("unreachable")

    def _refused(self, fault: Fault, more: str = "") -> RefusedError:
        return RefusedError(self._redacted(f"{fault.said}{more}"), reason=self._redacted(fault.reason))

    def _failed(self, server: Server, fault: Fault) -> None:
        """Pause a server; without another server, also reduce the pace after a refusal for load."""
        said = self._redacted(fault.said)
        with self._changed:
            server.failed(said, self.patience, at_once=fault.is_down, retry_after=fault.retry_after)
            if fault.is_of_load and not self._has_other((server,)):
                self._pace.refused()

    def _has_other(self, servers: Container[Server]) -> bool:
        """Return whether there is a usable server that is not in `servers`."""
        with self._changed:
            now = time.monotonic()
            return any(each not in servers and each.is_usable(now) for each in self._servers)

    def _remember(self, content: bytes | None, path: str, read: Callable[[Any], Any]) -> None:
        """Keep the shortest answered request as the control."""
        with self._changed:
            if content is not None and (self._control is None or len(content) < len(self._control[0])):
                self._control = content, path, read

    def _answers_control(self, server: Server, *, unknown: bool) -> bool:
        """Return whether a server answers the control; `unknown` if there is no control yet.

        Raises:
            ServerError: the server refuses the control too.
        """
        if self._control is None:
            return unknown
        what = "a request that was answered before"
        try:
            self._send(self._taken(server, {}), *self._control, 1)
        except AnswerError as answer:
            fault = answer.fault(server.url, what)
        except UnusableAnswerError as error:
            fault = Fault(f"{server.url}: {what}: {error}")
        except httpx2.HTTPError as error:
            fault = fault_of_exception(error, server.url)
        else:
            return True
        if fault.final is not None:
            raise ServerError(
                self._redacted(
                    f"{fault.said}; have the server's settings changed? Finished work is kept: start it with the earlier ones and run the same command again"
                )
            )
        self._failed(server, fault)
        return False

    def _taken(self, only: Server | None, asked: Mapping[Server, int]) -> Server:
        """Wait for a free place and return the server to use; `_send` releases the place."""
        with self._changed:
            while self._running >= self._pace.limit and not self._closed:
                self._changed.wait()
            server = only or choose(self._servers, asked)
            self._running += 1
            server.in_flight += 1
            server.sent += 1
        return server

    def _send(
        self, server: Server, content: bytes | None, path: str, read: Callable[[Any], Answer], size: int
    ) -> Answer:
        answered = False
        try:
            if content is None:
                response = server.http.get(path)
            else:
                response = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
            if content is None and response.status_code == 404:
                return read(None)
            if response.status_code != 200:
                raise AnswerError(response)
            answered = True
        except (httpx2.HTTPError, RuntimeError):
            if not self._closed:
                raise
            raise ServerError("the client was closed") from None
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
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise UnusableAnswerError(f"not an answer of this API ({type(error).__name__}: {error})") from None
        with self._changed:
            server.answered()
        return result

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
