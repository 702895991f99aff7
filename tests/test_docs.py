"""Every command has help with an example, and stands in the README."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

import pipeline
from pipeline import config as cfg
from pipeline.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(main.commands))
def test_a_command_has_help_an_example_and_a_place_in_the_readme(name):
    text = CliRunner().invoke(main, [name, "--help"]).output
    assert "Example" in text
    assert f"softlabel {name}" in text
    assert f"softlabel {name}" in README
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


def test_make_targets_stand_in_the_readme():
    for target in (
        "demo",
        "demo-lm",
        "test",
        "test-real",
        "test-faults",
        "check",
        "cache-logits",
        "train-student",
        "bench",
        "report",
        "sweep",
        "test-browser",
    ):
        assert f"make {target}" in README, target


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
