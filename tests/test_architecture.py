"""Imports follow the data flow, between packages and inside them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import get_args

import pytest

from pipeline.config.options import TaskName
from pipeline.tasks import TASKS

ROOT = Path(__file__).parents[1] / "pipeline"
#: Package -> its parts (sub-packages or modules) from left to right. A part imports only from parts
#: to its left, and parts of one step never import each other. Packages that are not listed have no
#: order but may have no cycle.
ORDER: dict[str, list[set[str]]] = {
    "": [
        {"errors"},
        {"verbosity"},
        {"records", "progress"},
        {"config"},
        {"servers"},
        {"sources"},
        {"metrics"},
        {"softlabels"},
        {"tasks"},
        {"models"},
        {"cache"},
        {"cross_tokenizer"},
        {"capture", "training"},
        {"evaluation", "generation"},
        {"sharing", "outlines"},
        {"steps"},
        {"rounds"},
        {"workflow"},
        {"starter", "sweep"},
        {"cli"},
        {"__init__", "__main__"},
    ],
    "cache": [{"storage"}, {"format"}, {"reading"}, {"views"}, {"writing"}, {"transforms"}, {"__init__"}],
    "capture": [
        {"forward", "labelled", "plan"},
        {"append", "audit", "automatic", "written"},
        {"teachers"},
        {"permutation"},
        {"job"},
        {"reading"},
        {"shard", "space"},
        {"head", "estimate", "write"},
        {"engines"},
        {"run"},
        {"__init__"},
    ],
    "generation": [
        {"records"},
        {"agreement", "draws", "faults", "prompts", "schema", "writer"},
        {"card", "examples", "local", "served"},
        {"finish"},
        {"job"},
        {"shard"},
        {"run"},
        {"__init__"},
    ],
    "cross_tokenizer": [
        {"token_bytes"},
        {"vocabulary_map"},
        {"train", "embeddings"},
        {"rows"},
        {"chats"},
        {"kept"},
        {"view"},
        {"opening", "students"},
        {"__init__"},
    ],
    "training": [
        {"settings", "batches", "checkpoints", "divergences", "schedule", "scores", "spans", "stopping", "student"},
        {"losses", "card", "recipe"},
        {"fused"},
        {"forward"},
        {"refusals", "saving"},
        {"trainer", "teacher"},
        {"run"},
        {"__init__"},
    ],
    "starter": [
        {"facts"},
        {"counts", "roles", "places", "teacher"},
        {"records"},
        {"cautions", "times"},
        {"page"},
        {"run"},
        {"__init__"},
    ],
    "evaluation": [
        {"records", "passes", "continuations", "table", "targets", "text_bytes", "basis"},
        {"run"},
        {"measures"},
        {"report"},
        {"__init__"},
    ],
}
FILES = sorted(ROOT.rglob("*.py"))
MOST_LINES, MOST_MODULES = 400, 15
#: Exempt from the limit: the record types stay on one page.
LONG = {"records.py"}


def module_of(path: Path) -> str:
    parts = ("pipeline", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """Return every module of this project that a file imports, also in functions and for types."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def part_of(module: str, package: str) -> str | None:
    """Return the part of a package that a module belongs to, or None."""
    prefix = f"pipeline.{package}".rstrip(".")
    if module == prefix:
        return "__init__"
    return module.removeprefix(f"{prefix}.").split(".")[0] if module.startswith(f"{prefix}.") else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_left(path):
    mine = module_of(path)
    for package, order in ORDER.items():
        rank = {name: i for i, names in enumerate(order) for name in names}
        here = part_of(mine, package)
        if here is None:
            continue
        for other in imports(path):
            there = part_of(other, package)
            if there is not None and there != here:
                assert rank[there] < rank[here], f"{path}: {package or 'pipeline'}: {here} imports {there}"


def test_no_import_cycle():
    graph = {module_of(path): {name for name in imports(path) if name in MODULES} for path in FILES}
    for name, others in graph.items():
        others.discard(name)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_every_part_has_its_place():
    """Every module of an ordered package is in the order, and the order lists nothing else."""
    for package, order in ORDER.items():
        found = {part for path in FILES if (part := part_of(module_of(path), package)) is not None}
        assert found | {"__init__"} == set().union(*order) | {"__init__"}, package or "pipeline"


def test_rooms_are_small():
    for path in FILES:
        lines = len(path.read_text().splitlines())
        assert lines <= MOST_LINES or path.name in LONG, f"{path}: {lines} lines"
    for folder in {path.parent for path in FILES}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MOST_MODULES, f"{folder}: {len(modules)} modules"


def test_no_task_is_named_outside_the_tasks():
    """Differences between tasks are behind the task protocol.

    No other module refers to a task, or its kind of adapter, by name. The choices of `--task` are
    an exception, since the command line is parsed without importing torch.
    """
    texts = {name for task in TASKS.values() for name in (task.name, task.peft_type)}
    classes = {type(task).__name__ for task in TASKS.values()}
    for path in FILES:
        if part_of(module_of(path), "") == "tasks" or path.name == "options.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant):
                assert not isinstance(node.value, str) or node.value not in texts, f"{path}:{node.lineno}: {node.value}"
            elif isinstance(node, ast.Name):
                assert node.id not in classes, f"{path}:{node.lineno}: {node.id}"


def test_the_command_line_has_the_tasks_that_there_are():
    assert set(get_args(TaskName)) == set(TASKS)
