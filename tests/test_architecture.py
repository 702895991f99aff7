"""Imports go one way, as the data does."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "pipeline"
#: Left to right; those of one step never import each other.
ORDER: list[set[str]] = [
    {"errors"},
    {"records"},
    {"config"},
    {"sources"},
    {"metrics"},
    {"softlabels"},
    {"tasks"},
    {"models"},
    {"cache"},
    {"capture", "training"},
    {"evaluation"},
    {"sharing"},
    {"workflow"},
    {"sweep"},
    {"cli"},
    {"__init__", "__main__"},
]
RANK = {name: i for i, names in enumerate(ORDER) for name in names}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_left(path):
    mine = part_of(path)
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "pipeline":
                names = [f"pipeline.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if not name.startswith("pipeline."):
                continue
            other = name.split(".")[1]
            assert other == mine or RANK[other] < RANK[mine], f"{path}: {mine} imports {other}"


def test_no_task_is_named_outside_the_tasks():
    """What differs between tasks stands behind the protocol."""
    for path in ROOT.rglob("*.py"):
        if part_of(path) in ("tasks", "config", "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                text = ast.unparse(node)
                assert "causal-lm" not in text, f"{path}: {text}"
                assert "sequence-classification" not in text, f"{path}: {text}"
