"""Thoroughness of a test run.

`make test` tries a few hypothesis examples; `make test-full` tries many and draws every figure.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

FULL = os.environ.get("SOFTLABEL_TESTS") == "full"


def examples(few: int, many: int) -> int:
    """Return the number of examples that hypothesis tries."""
    return many if FULL else few


def in_full(*values: Any) -> list[Any]:
    """Parameters of a test that run with `make test-full` only."""
    return [pytest.param(value, marks=pytest.mark.full) for value in values]


#: A PNG of one grey pixel.
_PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c636800000082008177cd72b60000000049454e44ae426082"
)


@pytest.fixture
def plain_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build the figures of reports without drawing them, which takes two seconds per report.

    `make test-full` draws them.
    """
    if not FULL:
        from pipeline.evaluation.report import figures

        monkeypatch.setattr(figures, "png", lambda figure, style: None if figure is None else _PIXEL)
