"""The services that a training run reports to.

Covers the flag, the section of a YAML file, missing packages, and separate runs for each student.
"""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from pipeline.config import TrainStudentConfig
from pipeline.errors import ConfigError, MisuseError
from pipeline.models.arguments import check_installed, own_run, training_arguments
from pipeline.models.arguments import reporting as module
from pipeline.workflow import _key


def test_every_service_of_transformers_is_known():
    assert set(module._PACKAGES) == set(INTEGRATION_TO_CALLBACK)


def test_the_flag_becomes_report_to_and_the_output_names_the_run(tmp_path):
    args = training_arguments(str(tmp_path / "student"), {}, report_to=("tensorboard",))
    assert (args.report_to, args.run_name, args.project) == (["tensorboard"], "student", "soft-label-pipeline")
    assert training_arguments(str(tmp_path), {}, report_to=("none",)).report_to == []
    assert training_arguments(str(tmp_path), {}).report_to == []
    assert "tensorboard" in training_arguments(str(tmp_path), {}, report_to=("all",)).report_to


def test_the_section_names_them_too(tmp_path):
    section = {"report_to": "tensorboard", "run_name": "first", "project": "mine"}
    args = training_arguments(str(tmp_path), section)
    assert (args.report_to, args.run_name, args.project) == (["tensorboard"], "first", "mine")


@pytest.mark.parametrize(
    ("asked", "section", "error", "message"),
    [
        (("tensorboard",), {"report_to": "none"}, MisuseError, "--report-to tensorboard: the training section has"),
        (("none", "wandb"), {}, MisuseError, "none and all cannot be combined"),
        (("wandb",), {}, ConfigError, r"^--report-to wandb: its package is missing: pip install wandb"),
        (("comet_ml",), {}, ConfigError, r"pip install comet-ml"),
        (("wandbb",), {}, ConfigError, r"^--report-to wandbb: expected none, all, or some of .*wandb"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, monkeypatch, asked, section, error, message):
    monkeypatch.setattr(module, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(error, match=message) as caught:
        training_arguments(str(tmp_path), section, report_to=asked)
    assert "\n" not in str(caught.value)


def test_the_section_is_checked_as_well(monkeypatch):
    monkeypatch.setattr(module, "get_available_reporting_integrations", list)
    with pytest.raises(ConfigError, match="training: report_to: trackio: its package is missing: pip install trackio"):
        check_installed(["trackio"], "training: report_to:")


def test_where_it_is_reported_makes_no_stage_stale(tmp_path):
    plain = TrainStudentConfig(cache=(str(tmp_path),), student="s", output="o")
    assert _key(plain) == _key(dataclasses.replace(plain, report_to=("tensorboard",)))
    assert _key(plain) != _key(dataclasses.replace(plain, seed=1))


@pytest.fixture
def wandb(monkeypatch):
    found = SimpleNamespace(run=None, ended=[])

    def finish(exit_code):
        found.run = None
        found.ended.append(exit_code)

    found.finish = finish
    monkeypatch.setitem(sys.modules, "wandb", found)
    return found


REPORTED = SimpleNamespace(report_to=["wandb"])


def test_a_run_that_the_training_has_opened_ends_with_it(wandb, capsys):
    with own_run(REPORTED):
        wandb.run = "opened by the callback"
        print("a service's own words")
    assert wandb.ended == [0]
    said = capsys.readouterr()
    assert said.out == ""
    assert "a service's own words" in said.err


def test_a_run_of_the_caller_goes_on(wandb):
    wandb.run = "opened before"
    with own_run(REPORTED):
        pass
    assert wandb.ended == []


def test_what_wandb_refuses_is_one_line(wandb):
    class UsageError(Exception):
        pass

    UsageError.__module__ = "wandb.errors.errors"
    with (
        pytest.raises(ConfigError, match=r"^training: report_to: wandb: No API key; WANDB_MODE=offline"),
        own_run(REPORTED),
    ):
        raise UsageError("No API key.\nmore")


def test_an_error_of_the_training_ends_the_run_as_failed(wandb):
    def training():
        with own_run(REPORTED):
            wandb.run = "opened by the callback"
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        training()
    assert wandb.ended == [1]
