"""What a failed request means: whether to send it again, and the line that says what is wrong."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import httpx2

from pipeline.errors import ServerError
from pipeline.servers.addresses import KEY_VARIABLE

_MOST_TEXT, _MOST_REASON = 300, 150
#: URLs, paths of two parts and more, hosts with a port, addresses, and ids of requests.
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
#: Longest `Retry-After` that is kept to, seconds.
_MOST_WAIT = 60.0


class RefusedError(ServerError):
    """A server refuses one request, and would refuse it again; its text names the server."""

    def __init__(self, said: str, *, reason: str) -> None:
        """What is wrong.

        Args:
            reason: the same for a report that is published: without the server's address, the row's
                name, and paths.
        """
        super().__init__(said)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return _refused, (str(self), self.reason)


def _refused(said: str, reason: str) -> RefusedError:
    return RefusedError(said, reason=reason)


class RefusedKeyError(ServerError):
    """A server refuses the key, or asks for one."""


class UnusableAnswerError(Exception):
    """An answer of status 200 that is not what was asked for."""

    def __init__(self, said: str, *, of_row: bool = False) -> None:
        """What was expected, and what was found.

        Args:
            of_row: the answer is in order but for its numbers: given again and again, it is the
                request that is bad.
        """
        super().__init__(said)
        self.of_row = of_row


class AnswerError(Exception):
    """An answer with another status than 200."""

    def __init__(self, response: httpx2.Response) -> None:
        """Keep what it says."""
        super().__init__(response.status_code)
        self.response = response

    def fault(self, url: str, what: str) -> Fault:
        """What it means for the request that `what` names."""
        response = self.response
        return fault_of_answer(response.status_code, response.content, url, what, response.headers.get("Retry-After"))


@dataclass(frozen=True, slots=True)
class Fault:
    """What went wrong with one request."""

    said: str
    """One line: which server, and what it said."""
    final: type[ServerError] | None = None
    """To be raised at once; None: the request is sent again."""
    is_down: bool = False
    """The server cannot be reached."""
    is_of_server: bool = False
    """The server is left alone for a while."""
    is_of_load: bool = False
    """Fewer requests are to be in flight."""
    is_of_request: bool = False
    """It may be this request that the server fails at."""
    retry_after: float = 0.0
    """Seconds."""
    reason: str = ""
    """What is wrong with this request, for a report that is published; see `RefusedError`."""


def fault_of_exception(error: httpx2.HTTPError, url: str) -> Fault:
    """No answer came."""
    text = " ".join(str(error).split())[:_MOST_TEXT] or type(error).__name__
    if isinstance(error, httpx2.ConnectError) and "certificate" in text.lower():
        return Fault(
            f"{url}: the certificate of the server is not trusted ({text}); set SSL_CERT_FILE", final=ServerError
        )
    if isinstance(error, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
        return Fault(  # the text may quote the key
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
    """An answer of another status than 200."""
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
    """What a server says, without addresses, paths of its machine, and numbers of requests; short."""
    return _PRIVATE.sub("...", text)[:_MOST_REASON]


def message_of(body: bytes) -> str:
    """What a server says in the body of an error, as one line."""
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
