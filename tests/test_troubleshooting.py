"""Every message quoted in docs/troubleshooting.md occurs in the source."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
#: Minimum length of the longest fixed part of a quoted line; shorter parts would match anywhere.
LONGEST = 11
#: Placeholder of a variable part in a source text.
VARIABLE = "\0"
#: A placeholder of a %-format.
PLACE = re.compile(r"%[-+#0 ]*[\d.]*[srdfg]")


def quoted_lines(page: str) -> list[str]:
    """Return the first column of each table whose header begins with `line`."""
    found, is_of_lines = [], False
    for row in page.splitlines():
        if not row.startswith("|"):
            is_of_lines = False
        elif row.startswith("| line |"):
            is_of_lines = True
        elif is_of_lines and not row.startswith("|---"):
            cell = re.match(r"\| `([^`]+)` \| ", row)
            assert cell is not None, f"expected one quoted line in the first column: {row}"
            found.append(cell[1])
    return found


def fixed_parts(line: str) -> list[str]:
    """Return the parts of the line between the variable parts, `...`."""
    return [part.strip() for part in line.split("...") if part.strip()]


def text_of(node: ast.AST) -> str:
    """Return a string as the program builds it; the parser has joined adjacent literals."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return VARIABLE


def texts_of(source: str) -> set[str]:
    """Return the strings, f-strings and %-formats of a module, except docstrings."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = {
        text_of(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp) and id(node) not in docstrings
    }
    return {PLACE.sub(VARIABLE, text).replace("%%", "%") for text in texts}


@cache
def all_texts() -> frozenset[str]:
    """Return the texts of every module of the package."""
    sources = [path.read_text() for path in (ROOT / "pipeline").rglob("*.py")]
    return frozenset(text for source in sources for text in texts_of(source))


def is_in_the_source(line: str) -> bool:
    """Whether one text holds all fixed parts of a line, in order."""
    parts = fixed_parts(line)
    in_order = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    return any(max(parts, key=len) in text and in_order.search(text) for text in all_texts())


LINES = quoted_lines(PAGE)


@pytest.mark.parametrize("line", LINES)
def test_a_quoted_line_is_in_the_source(line):
    assert max(map(len, fixed_parts(line))) >= LONGEST
    assert is_in_the_source(line)


def test_each_line_is_quoted_once():
    assert len(LINES) >= 60
    assert [line for line in set(LINES) if LINES.count(line) > 1] == []


def test_lines_are_found_in_pages_and_texts_in_sources():
    page = "| line | meaning |\n|---|---|\n| `no such thing ...; look` | x |\n\n| flag | effect |\n|---|---|\n| `--quiet` | x |\n"
    assert quoted_lines(page) == ["no such thing ...; look"]
    assert fixed_parts("no such thing ...; look ...") == ["no such thing", "; look"]
    source = '"""A docstring."""\nx = f"a {y} b" " c" + d\nlogger.warning("%s: %.1f%% of " "%d rows", x, y, z)\n'
    texts = texts_of(source)
    assert {"a \0 b c\0", "\0: \0% of \0 rows"} <= texts
    assert not any("docstring" in text for text in texts)
    assert is_in_the_source("unknown key ...")
    assert not is_in_the_source("unknown key ... of a line that nothing prints")
