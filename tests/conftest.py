"""Pytest hooks. Fixtures and tiny models are in `tests.support.tiny`."""

from __future__ import annotations

import importlib
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests.support.budget import (  # noqa: F401 - hooks
    pytest_collection_modifyitems,
    pytest_runtest_logreport,
    pytest_terminal_summary,
)


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, which import torch, in every process that runs tests.

    The xdist controller, which only distributes tests, does not load them.
    """
    config.option.loadscopereorder = False  # keeps the order of `tests.support.budget`
    if not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.support.tiny")


def __getattr__(name: str) -> Any:
    """Import objects from `tests.support.tiny` on first access, which keeps this import fast."""
    if name not in ("TINY", "TOPICS", "WORDS", "sentence", "tiny_model"):
        raise AttributeError(name)
    return getattr(importlib.import_module("tests.support.tiny"), name)
