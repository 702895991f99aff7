"""Code blocks of Markdown pages, and the `softlabel` commands in them."""

from __future__ import annotations

import re
import shlex

_FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?:^(?: {4}.*)?\n)+", re.MULTILINE)
_COMMAND = re.compile(r"\s*(?:\$ )?(?:torchrun .* -m pipeline|python -m pipeline|softlabel) (.*)")


def code_of(page: str) -> list[tuple[str, str]]:
    """Return language and text of the fenced blocks, then of the indented ones (language "")."""
    found = [(block[2], block[3]) for block in _FENCED.finditer(page)]
    return found + [("", block[0]) for block in _INDENTED.finditer(_FENCED.sub("", page)) if block[0].strip()]


def commands_in(code: str) -> list[list[str]]:
    """Return the `softlabel` commands of a block as words; a `torchrun` command counts as one."""
    lines = re.sub(r"\\\n", " ", code).splitlines()
    return [shlex.split(found[1], comments=True) for line in lines if (found := _COMMAND.fullmatch(line))]
