"""How thorough a run is.

`make test` tries a few examples, `make test-full` many, and draws every picture.
"""

from __future__ import annotations

import os

import pytest

FULL = os.environ.get("SOFTLABEL_TESTS") == "full"


def examples(few: int, many: int) -> int:
    """Examples that hypothesis tries."""
    return many if FULL else few


#: One grey pixel.
_PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c636800000082008177cd72b60000000049454e44ae426082"
)


@pytest.fixture
def plain_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of reports are built and not drawn, which takes two seconds a report.

    `make test-full` draws them.
    """
    if not FULL:
        from pipeline.evaluation.report import figures

        monkeypatch.setattr(figures, "png", lambda figure, style: None if figure is None else _PIXEL)
