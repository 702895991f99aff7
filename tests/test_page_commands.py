"""Commands, Python and YAML of the pages run on tiny models and data under the pages' names.

`tests/test_first_hour.py` runs those of README and `python.md` one after another,
`tests/cache/test_format_page.py` those of `format.md`, `tests/test_rounds.py` those of `rounds.md`.
Run with `make test-full`.
"""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from pipeline.cli import main
from tests.support.markdown import commands_in
from tests.support.pages import Block, World, blocks

pytestmark = pytest.mark.full

DOCS = Path(__file__).parents[1] / "docs"
ELSEWHERE = {"format.md", "python.md", "rounds.md"}
BLOCKS = [block for page in sorted(DOCS.glob("*.md")) if page.name not in ELSEWHERE for block in blocks(page)]
#: Commands that need a server, a bucket, a hub, a cluster or several GPUs; other tests cover them.
NOT_HERE = re.compile(r"http://|hf://|s3://|--engine ray|torchrun|fsdp|\.\.\.")
#: Flags that limit commands to a few steps and rows.
FEW = {"--max-steps": "2", "--num-examples": "8", "--max-new-tokens": "8"}
ALSO = {
    "train-teacher": ["--max-steps", "2"],
    "train-student": ["--max-steps", "2"],
    "sweep": ["--max-steps", "2"],
    "report": ["--rounds", "0"],
    "audit": ["--rows", "8"],
    "run": ["--dry-run"],  # `tests/starter/` runs what `init` writes
}


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and not NOT_HERE.search(block.text)]


def name(block: Block) -> str:
    return f"{block.page}-{block.number}"


def runnable(block: Block) -> list[list[str]]:
    return [
        words
        for words in commands_in(block.text)
        if not NOT_HERE.search(shlex.join(words)) and words[0] in main.commands
    ]


def small(words: list[str]) -> list[str]:
    """Return the command with few steps, and a sweep with the first value of each axis."""
    if words[0] == "sweep":
        words = [words[0], *itertools.chain.from_iterable(dict(zip(words[-2::-2], words[:0:-2], strict=True)).items())]
    words = [FEW.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    return words if "--max-steps" in words else [*words, *ALSO.get(words[0], [])]


def named(block: Block, words: list[str]) -> set[str]:
    """Return the inputs of a command: its words and their parts after "=", without --output's."""
    found = {word for before, word in zip(["", *words], words, strict=False) if before != "--output"}
    if words[0] == "run":
        found |= values_of(yaml.safe_load(Path(words[1]).read_text(encoding="utf-8")))
    return found | {word.partition("=")[2] for word in found}


def values_of(file: Any) -> set[str]:
    """Return all texts in a YAML file."""
    if isinstance(file, dict):
        return set().union(*map(values_of, file.values()))
    if isinstance(file, list):
        return set().union(*map(values_of, file))
    return {str(file)}


@pytest.fixture
def world(tmp_path, monkeypatch, bert_tokenizer, lm_tokenizer) -> World:
    monkeypatch.chdir(tmp_path)
    return World(bert_tokenizer, lm_tokenizer)


@pytest.mark.parametrize("block", [each for each in BLOCKS if runnable(each)], ids=name)
def test_commands_of_a_page_run(world, block):
    for words in runnable(block):
        world.make(block.page, named(block, words))
        done = CliRunner().invoke(main, small(words))
        assert done.exit_code == 0, (shlex.join(words), done.output, done.exception)


@pytest.mark.parametrize("block", of("python"), ids=name)
def test_python_of_a_page_runs(world, block):
    world.make(block.page, set(re.findall(r'"([^"\n]+)"', block.text)) - {"runs/cache"})
    exec(block.text, world.objects(block.page))


@pytest.mark.parametrize("block", of("yaml"), ids=name)
def test_yaml_of_a_page_is_a_file_for_run(world, block):
    """Whole files run unchanged; single settings run in a section of `train-student`."""
    file = yaml.safe_load(block.text)
    whole = "task" in file
    if not whole:
        file["training"]["use_cpu"] = True  # `bf16` works without a GPU then
        file = {"train-student": {"cache": "runs/cache", "student": "STUDENT", "output": "runs/trained", **file}}
    Path("page.yaml").write_text(yaml.safe_dump(file))
    world.make(block.page, {"runs/cache", "STUDENT", *(values_of(file))} - ({"runs/cache"} if whole else set()))
    done = CliRunner().invoke(main, ["run", "page.yaml", "--dry-run"])
    assert done.exit_code == 0, (done.output, done.exception)


def test_blocks_are_found():
    assert sum(len(runnable(block)) for block in BLOCKS) > 80
    assert len(of("python")) >= 6
    assert len(of("yaml")) >= 2
