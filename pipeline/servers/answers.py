"""Interpretation of failed requests: whether to retry, and the error message."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import httpx2

from pipeline.errors import ServerError
from pipeline.servers.addresses import KEY_VARIABLE

_MOST_TEXT, _MOST_REASON = 300, 150
#: URLs, paths of two or more parts, hosts with a port, IP addresses, and request ids.
_PRIVATE = re.compile(
    r"""[a-z][a-z0-9+.-]*://\S+            # a URL
    | (?<![\w.])(?:~|[a-z]:)?(?:[/\\][\w.@+~-]+){2,}[/\\]?  # a path
    | \b(?:\d{1,3}\.){3}\d{1,3}(?::\d+)?\b       # an IPv4 address
    | (?:[0-9a-f]{0,4}:){3,}[0-9a-f]{0,4}    # an IPv6 address
    | \b(?:[\w-]+\.)+[a-z][\w-]*:\d+\b       # host.domain:port
    | \blocalhost(?::\d+)?\b
    | \b[\w-]*[0-9a-f]{12,}[\w-]*\b           # an id of a request
    """,
    re.VERBOSE | re.IGNORECASE,
)
#: Upper bound of `Retry-After` in seconds.
_MOST_WAIT = 60.0


class RefusedError(ServerError):
    """A server permanently refuses one request; the message names the server."""

    def __init__(self, said: str, *, reason: str) -> None:
        """Initialize the error.

        Args:
            reason: the message for a published report: without the server's address, the name of
                the row, and paths.
        """
        super().__init__(said)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return _refused, (str(self), self.reason)


def _refused(said: str, reason: str) -> RefusedError:
    return RefusedError(said, reason=reason)


class RefusedKeyError(ServerError):
    """A server refuses the API key, or requires one."""


class UnusableAnswerError(Exception):
    """A response with status 200 that does not have the expected content."""

    def __init__(self, said: str, *, of_row: bool = False) -> None:
        """Initialize the error with what was expected and found.

        Args:
            of_row: the response has the right form, but invalid numbers. If this repeats, the
                request is at fault, not the server.
        """
        super().__init__(said)
        self.of_row = of_row


class AnswerError(Exception):
    """A response with another status than 200."""

    def __init__(self, response: httpx2.Response) -> None:
        """Store the response."""
        super().__init__(response.status_code)
        self.response = response

    def fault(self, url: str, what: str) -> Fault:
        """Return the fault of the request that `what` names."""
        response = self.response
        return fault_of_answer(response.status_code, response.content, url, what, response.headers.get("Retry-After"))


@dataclass(frozen=True, slots=True)
class Fault:
    """A failure of one request."""

    said: str
    """One line with the server and its message."""
    final: type[ServerError] | None = None
    """The error to raise immediately; None: retry the request."""
    is_down: bool = False
    """The server cannot be reached."""
    is_of_server: bool = False
    """The server is not used for a while."""
    is_of_load: bool = False
    """Fewer requests should be in flight."""
    is_of_request: bool = False
    """The request itself may be the cause."""
    retry_after: float = 0.0
    """In seconds."""
    reason: str = ""
    """The message for a published report; see `RefusedError`."""


def fault_of_exception(error: httpx2.HTTPError, url: str) -> Fault:
    """Return the fault of a request without a response."""
    text = " ".join(str(error).split())[:_MOST_TEXT] or type(error).__name__
    if isinstance(error, httpx2.ConnectError) and "certificate" in text.lower():
        return Fault(
            f"{url}: the certificate of the server is not trusted ({text}); set SSL_CERT_FILE", final=ServerError
        )
    if isinstance(error, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
        return Fault(  # the text may contain the key
            f"{url}: {type(error).__name__}; check the address, and the key in {KEY_VARIABLE}", final=ServerError
        )
    if isinstance(error, httpx2.ConnectTimeout):
        return Fault(f"{url}: no connection within the time allowed", is_down=True, is_of_server=True)
    if isinstance(error, httpx2.ConnectError | httpx2.ProxyError):
        return Fault(f"{url}: cannot be reached ({text})", is_down=True, is_of_server=True)
    if isinstance(error, httpx2.TimeoutException):
        said, reason = "no answer within the time allowed", "the server gives no answer"
        return Fault(f"{url}: {said}", is_of_request=True, is_of_server=True, is_of_load=True, reason=reason)
    if isinstance(error, httpx2.DecodingError):
        said, reason = "the answer cannot be unpacked", "the server's answer cannot be unpacked"
    else:
        said, reason = "the connection broke", "the server breaks the connection"
    return Fault(f"{url}: {said} ({text})", is_of_request=True, is_of_server=True, reason=reason)


def fault_of_answer(status: int, body: bytes, url: str, what: str, retry_after: str | None) -> Fault:
    """Return the fault of a response with another status than 200."""
    text = message_of(body)
    said = f"{url}: {what}: {status} {text}".rstrip()
    if status in (401, 403):
        said = f"{url}: refuses the key ({status}); set {KEY_VARIABLE} in the environment"
        return Fault(said, final=RefusedKeyError)
    if status == 404:
        return Fault(
            f"{said}; expected the base address of a vLLM or SGLang server, as http://host:8000/v1, and the name of a model that it serves (--server-model)",
            final=ServerError,
        )
    if 300 <= status < 400:
        return Fault(f"{url}: redirects ({status}); give --server the address that it redirects to", final=ServerError)
    if status in (429, 503):
        return Fault(said, is_of_server=True, is_of_load=True, retry_after=_seconds(retry_after))
    reason = f"the server refuses it: {status} {publishable(text)}".rstrip()
    if status in (408, 425) or status >= 500:
        return Fault(said, is_of_request=True, is_of_server=True, reason=reason)
    return Fault(said, final=RefusedError, reason=reason)


def publishable(text: str) -> str:
    """Shorten a server's message, and remove addresses, paths and request ids from it."""
    return _PRIVATE.sub("...", text)[:_MOST_REASON]


def message_of(body: bytes) -> str:
    """Return the message in the body of an error response, as one line."""
    text = body[:10_000].decode("utf-8", "replace")
    try:
        found: Any = json.loads(body)
    except ValueError:
        found = text
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    if isinstance(found, list) and found and isinstance(found[0], dict):
        found = found[0].get("msg", found)
    return " ".join(str(found).split())[:_MOST_TEXT]


def _seconds(retry_after: str | None) -> float:
    try:
        return min(max(float(retry_after or 0), 0.0), _MOST_WAIT)
    except ValueError:  # a date
        return 0.0
