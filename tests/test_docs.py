"""Commands, flags and names on the pages exist in the program, and code on the pages runs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

import pipeline
from pipeline import config as cfg
from pipeline.cli import main
from tests.support.markdown import code_of, commands_in

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}


@pytest.mark.parametrize("name", sorted(main.commands))
def test_a_command_has_help_an_example_and_a_place_in_the_pages(name):
    text = CliRunner().invoke(main, [name, "--help"]).output
    assert "Example" in text
    assert f"softlabel {name}" in text
    assert any(f"softlabel {name}" in page for page in PAGES.values())
    for parameter in main.commands[name].params:
        if parameter.param_type_name == "option":
            assert parameter.help, f"{name} {parameter.opts}"


@pytest.mark.parametrize("name", sorted(cfg.SECTIONS))
def test_every_setting_is_a_flag(name):
    flags = {option.lstrip("-") for parameter in main.commands[name].params for option in parameter.opts}
    for field in cfg.cli_fields(cfg.SECTIONS[name]):
        assert cfg.flag_name(field.name) in flags
    assert dataclasses.is_dataclass(cfg.SECTIONS[name])


def test_every_export_is_there_and_documented():
    for name in pipeline.__all__:
        assert getattr(pipeline, name).__doc__, name
    with pytest.raises(AttributeError):
        _ = pipeline.nothing


def test_the_readme_is_short():
    assert len(README.splitlines()) < 200
    for target in ("demo", "test", "cache-logits", "train-student", "report", "docs", "check"):
        assert f"make {target}" in README, target


@pytest.mark.parametrize("page", ["README.md", "data/README.md"])
def test_links_of_pages_outside_the_site(page):
    """Links of the site's pages are checked when the site is built."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text())
    here = [link for link in links if "://" not in link]
    assert len(here) > 10 or page != "README.md"
    assert [link for link in here if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_make_targets_of_the_pages_are_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, page in PAGES.items():
        for target in re.findall(r"`make ([a-z][a-z-]*)", page):
            assert target in targets, (name, target)


def commands_of(page: str) -> list[list[str]]:
    """Return the `softlabel` commands of a page's code blocks and code spans as words."""
    spans = [span for span in re.findall(r"`([^`\n]+)`", page) if span.startswith("softlabel ")]
    return [words for code in (*(text for _, text in code_of(page)), *spans) for words in commands_in(code)]


@pytest.mark.parametrize("name", sorted(PAGES))
def test_flags_of_a_pages_commands_are_there(name):
    """Includes commands with placeholders, which cannot be run."""
    for words in commands_of(PAGES[name]):
        if words[0] not in main.commands:
            assert words[0].startswith("-") or words[0].isupper() or words[0] == "help", words
            continue
        known = {flag for p in main.commands[words[0]].params for flag in (*p.opts, *p.secondary_opts)} | {"--help"}
        given = {word.partition("=")[0] for word in words[1:] if re.match(r"--[a-z]", word)}
        assert given <= known, (name, words, sorted(given - known))


def test_commands_are_found_in_pages():
    assert sum(len(commands_of(page)) for page in PAGES.values()) > 60
    page = "    softlabel run x.yaml\n\n```bash\nsoftlabel verify --cache a \\\n    --quick  # fast\n```\n`softlabel audit --cache c`\n"
    assert sorted(commands_of(page)) == [
        ["audit", "--cache", "c"], ["run", "x.yaml"], ["verify", "--cache", "a", "--quick"],
    ]  # fmt: skip


def test_the_tests_that_the_docs_name_are_there():
    named = [
        found
        for page in sorted((ROOT / "docs").glob("*.md"))
        for found in re.findall(r"(tests/\S+\.py)::(\w+)", page.read_text())
    ]
    assert len(named) > 20
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"


def test_the_run_files_are_whole():
    from pipeline.workflow import stage_configs

    for path in sorted(ROOT.glob("data/*/demo.yaml")):
        stages = [name for name, _ in stage_configs(cfg.load_config(path))]
        assert stages[-1] == "evaluate"
