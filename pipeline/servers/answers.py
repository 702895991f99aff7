"""What an answer that is no result means: whether to wait and ask again, and the line that says what is wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx2

from pipeline.errors import ServerError
from pipeline.servers.addresses import KEY_VARIABLE

_MOST_TEXT = 300
#: Longest `Retry-After` that is kept to, seconds.
_MOST_WAIT = 60.0


class RefusedError(ServerError):
    """A server refuses one request, and would refuse it again."""


class UnusableAnswerError(Exception):
    """An answer of status 200 that is not what was asked for."""

    def __init__(self, said: str, *, of_row: bool = False) -> None:
        """What was expected, and what was found.

        Args:
            of_row: the answer is in order but for its numbers: given again and again, it is the request that is bad.
        """
        super().__init__(said)
        self.of_row = of_row


@dataclass(frozen=True, slots=True)
class Fault:
    """What went wrong with one request."""

    said: str
    """One line: which server, and what it said."""
    final: type[ServerError] | None = None
    """To be raised at once; None: the request is sent again."""
    is_down: bool = False
    """The server cannot be reached: no request is sent there for a while."""
    is_of_load: bool = False
    """Fewer requests are to be in flight."""
    is_of_request: bool = False
    """It may be this request that the server fails at."""
    retry_after: float = 0.0
    """Seconds."""


def fault_of_exception(error: httpx2.HTTPError, url: str) -> Fault:
    """No answer came."""
    text = " ".join(str(error).split())[:_MOST_TEXT] or type(error).__name__
    if isinstance(error, httpx2.ConnectError) and "certificate" in text.lower():
        return Fault(
            f"{url}: the certificate of the server is not trusted ({text}); set SSL_CERT_FILE", final=ServerError
        )
    if isinstance(error, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
        return Fault(f"{url}: {text}; check the address, and the key in {KEY_VARIABLE}", final=ServerError)
    if isinstance(error, httpx2.ConnectTimeout):
        return Fault(f"{url}: no connection within the time allowed", is_down=True)
    if isinstance(error, httpx2.TimeoutException):
        return Fault(f"{url}: no answer within the time allowed", is_of_request=True, is_of_load=True)
    if isinstance(error, httpx2.ConnectError | httpx2.ProxyError):
        return Fault(f"{url}: cannot be reached ({text})", is_down=True)
    if isinstance(error, httpx2.DecodingError):
        return Fault(f"{url}: the answer cannot be unpacked ({text})", is_of_request=True)
    return Fault(f"{url}: the connection broke ({text})", is_of_request=True)


def fault_of_answer(status: int, body: bytes, url: str, what: str, retry_after: str | None) -> Fault:
    """An answer of another status than 200."""
    text = message_of(body)
    said = f"{url}: {what}: {status} {text}".rstrip()
    if status in (401, 403):
        return Fault(f"{url}: refuses the key ({status}); set {KEY_VARIABLE} in the environment", final=ServerError)
    if status == 404:
        return Fault(
            f"{said}; expected the base address of a vLLM or SGLang server, as http://host:8000/v1, and the name of a model that it serves (--server-model)",
            final=ServerError,
        )
    if 300 <= status < 400:
        return Fault(f"{url}: redirects ({status}); give --server the address that it redirects to", final=ServerError)
    if status in (429, 503):
        return Fault(said, is_of_load=True, retry_after=_seconds(retry_after))
    if status in (408, 425) or status >= 500:
        return Fault(said, is_of_request=True)
    return Fault(said, final=RefusedError)


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
