"""The architecture page names every package, the import order, and existing paths."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from tests.test_architecture import ORDER

ROOT = Path(__file__).parents[1]
PIPELINE = ROOT / "pipeline"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FIGURE = (ROOT / "docs" / "figures" / "architecture.svg").read_text(encoding="utf-8")
#: Prefixes of the page's paths. Other code spans with a slash are not paths.
TOPS = ("pipeline/", "tests/", "docs/", "data/", "benchmarks/")
FILES = ("CHANGELOG.md", "Makefile", "pyproject.toml")


def rows_of(section: str) -> list[tuple[str, str]]:
    """Return the first cell and the other cells of each table row of a section."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \| (.*) \|$", text, re.MULTILINE)


def named_in_tables() -> set[str]:
    """Return the packages and modules named in the tables, as paths below `pipeline/`."""
    rows = rows_of("Packages")
    spans = [(first, re.findall(r"`([a-z_/]+(?:\.py|/))`", cells)) for first, cells in rows]
    return {first for first, _ in rows} | {first + span for first, found in spans for span in found}


@pytest.mark.parametrize("package", ORDER, ids=lambda package: package or "pipeline")
def test_the_page_has_the_order_of_imports(package):
    lines = dict(rows_of("Import order"))
    steps = lines[f"{package or 'pipeline'}/"].split(" < ")
    assert [{part.strip("` ") for part in step.split(",")} for step in steps] == ORDER[package]


def test_the_figure_has_the_order_of_imports():
    """Each package is a box with the number of its step, and the steps are in import order."""
    texts = re.findall(r"<text [^>]*>([^<]+)</text>", FIGURE)
    boxes = [(name, int(number)) for name, number in pairwise(texts) if number.isdecimal()]
    expected = [(name, number) for number, step in enumerate(ORDER[""], start=1) for name in step]
    assert sorted(boxes) == sorted(expected)
    numbers = [number for _, number in boxes]
    assert numbers == sorted(numbers)


def test_the_page_names_every_package():
    folders = {f"{path.parent.relative_to(PIPELINE)}/" for path in PIPELINE.glob("*/**/__init__.py")}
    modules = {path.name for path in PIPELINE.glob("*.py")}
    assert len(folders) > 30
    assert (folders | modules) - named_in_tables() == set()


def test_the_paths_on_the_page_exist():
    spans = {span.partition("::")[0] for span in re.findall(r"`([^`\s]+)`", PAGE)}
    paths = {span for span in spans if (span.startswith(TOPS) or span in FILES) and "NAME" not in span}
    paths |= {f"pipeline/{name}" for name in named_in_tables()}
    assert len(paths) > 150
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []
