"""Verbosity flags of the group and of every command.

Worker processes and libraries follow them.
"""

from __future__ import annotations

import logging

import pytest
import transformers
from click.testing import CliRunner

from pipeline import config as cfg
from pipeline import verbosity
from pipeline.cli import main
from pipeline.models.quiet import quiet_libraries
from pipeline.verbosity import at_level


@pytest.fixture
def seen(monkeypatch):
    """Record the level at which a command ran."""
    found = []
    monkeypatch.setattr("pipeline.cache.verify", lambda *_, **__: found.append(verbosity.level_name()) or _NOTHING)
    return found


class _Nothing:
    problems, broken, shards, rows, positions, bytes, cache_id = (), (), 0, 0, 0, 0, "0" * 64


_NOTHING = _Nothing()


def call(*args: str):
    return CliRunner().invoke(main, list(args))


@pytest.mark.parametrize(
    ("before", "after", "level"),
    [
        ([], [], "info"),
        ([], ["--quiet"], "warning"),
        (["--quiet"], [], "warning"),
        (["--verbose"], [], "debug"),
        ([], ["--log-level", "error"], "error"),
        (["--log-level", "error"], ["--log-level", "error"], "error"),
    ],
)
def test_flags_before_and_after_the_command(seen, before, after, level):
    result = call(*before, "verify", "--cache", "x", *after)
    assert result.exit_code == 0, result.output
    assert seen == [level]
    assert result.stdout.startswith("x: whole. 0 shards")  # results are printed at every level
    assert verbosity.level_name() == "info"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], ["--quiet", "--verbose"]),
        (["--quiet"], ["--verbose"]),
        (["--quiet"], ["--log-level", "info"]),
        (["--log-level", "debug"], ["--log-level", "error"]),
    ],
)
def test_contradictions_are_misuse(seen, before, after):
    result = call(*before, "verify", "--cache", "x", *after)
    assert result.exit_code == 2
    assert "all of them set how much is printed; give only one" in result.stderr
    assert seen == []


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_has_them_and_no_setting_is_one(name):
    text = call(name, "--help").output
    assert all(flag in text for flag in ("--quiet", "--verbose", "--log-level"))
    if name in cfg.SECTIONS:
        assert not {"quiet", "verbose", "log_level"} & {field.name for field in cfg.cli_fields(cfg.SECTIONS[name])}


@pytest.mark.parametrize(
    ("level", "libraries"), [("info", logging.ERROR), ("debug", logging.INFO), ("critical", logging.CRITICAL)]
)
def test_libraries_follow(monkeypatch, level, libraries):
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    with at_level(level):
        quiet_libraries()
        found = transformers.logging.get_verbosity()
    quiet_libraries()
    assert found == libraries
    assert transformers.logging.get_verbosity() == logging.ERROR


def test_what_names_one_library_wins(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "warning")
    transformers.logging.set_verbosity_warning()
    quiet_libraries()
    assert transformers.logging.get_verbosity() == logging.WARNING
    transformers.logging.set_verbosity_error()


def test_the_log_follows_the_level(caplog):
    logger = logging.getLogger("pipeline.anything")
    for level, expected in (("warning", ["warned"]), ("info", ["said", "warned"])):
        caplog.clear()
        with at_level(level):
            logger.info("said")
            logger.warning("warned")
        assert [record.getMessage() for record in caplog.records] == expected
