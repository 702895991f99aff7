"""Addresses of inference servers, and their API key."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from urllib.parse import urlsplit, urlunsplit

from pipeline.errors import MisuseError

#: The environment variable with the API key; there is no flag for it.
KEY_VARIABLE = "SOFTLABEL_SERVER_KEY"


def base_urls(flags: Sequence[str]) -> tuple[str, ...]:
    """Return the root address of each server: `http://host:8000` for `http://host:8000/v1/`.

    Raises:
        MisuseError: not an http(s) address, an address with a user name or a password, or a
            duplicate.
    """
    found: list[str] = []
    for flag in flags:
        parts = urlsplit(flag.strip())
        try:
            port = parts.port
        except ValueError:
            port = -1
        if "@" in parts.netloc:
            raise MisuseError(
                f"--server {_without_user(flag)}: expected an address without a user name or a password; give a key as {KEY_VARIABLE} in the environment"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query or parts.fragment:
            raise MisuseError(f"--server {flag}: expected an address as http://host:8000/v1")
        path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        url = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        if url in found:
            raise MisuseError(f"--server {flag}: expected each server once, found it twice")
        found.append(url)
    return tuple(found)


def _without_user(flag: str) -> str:
    scheme, _, rest = flag.rpartition("//")
    return f"{scheme}//***@{rest.rpartition('@')[2]}"


def server_key() -> str | None:
    """Return the API key from the environment, or None if there is none.

    Raises:
        MisuseError: the key cannot be sent in a header.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise MisuseError(
            f"{KEY_VARIABLE}: expected printable ASCII without spaces and line breaks, found other characters; set it to the key alone"
        )
    return key or None


def is_loopback(url: str) -> bool:
    """Return whether an address is on this machine, so that proxies must not be used for it."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
