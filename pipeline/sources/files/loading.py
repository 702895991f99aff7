"""Silence library output while data is loaded, and format errors without credentials."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_MAX_REASON = 300


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs of `datasets`, and its progress bars if stderr is not a terminal."""
    import datasets
    from datasets.utils import logging

    verbosity = logging.get_verbosity()
    bars = (
        datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is None
        and not datasets.are_progress_bars_disabled()
        and not sys.stderr.isatty()
    )
    logging.set_verbosity(logging.CRITICAL)
    if bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def reason(error: BaseException) -> str:
    """Return the message of the first cause of an error, in one line and without credentials."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return redact(text if len(text) <= _MAX_REASON else text[:_MAX_REASON] + "...")


def redact(text: str) -> str:
    """Replace hub tokens, and user names, passwords and query strings in URLs, by `***`."""
    text = re.sub(r"\bhf_[A-Za-z0-9]{8,}", "hf_***", text)
    text = re.sub(r"://[^/@\s]+@(?=[^/\s])", "://***@", text)
    return re.sub(r"(\w+://[^\s?]+)\?[^\s'\")]+", r"\1?***", text)
