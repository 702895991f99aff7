"""Each setting of the installed transformers is classified, and invalid ones are refused first."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments

from pipeline.errors import MisuseError
from pipeline.tasks import get_task
from pipeline.training.refusals import check_metric, refuse_evaluation, refuse_unused
from pipeline.training.settings import (
    HARMLESS,
    HONOURED,
    HONOURED_PARAMETERS,
    NEED_EVALUATION,
    REFUSED,
    REFUSED_PARAMETERS,
    settings_table,
)


def test_every_field_of_training_arguments_is_classified_once():
    fields = sorted(field.name for field in dataclasses.fields(TrainingArguments))
    assert sorted([*REFUSED, *HARMLESS, *HONOURED]) == fields


def test_every_parameter_of_trainer_is_classified_once():
    parameters = sorted(set(inspect.signature(Trainer.__init__).parameters) - {"self"})
    assert sorted([*REFUSED_PARAMETERS, *HONOURED_PARAMETERS]) == parameters


def test_what_needs_an_evaluation_is_honoured_otherwise():
    assert set(NEED_EVALUATION) < HONOURED


def test_the_page_of_settings_is_up_to_date():
    # python -c 'from pipeline.training.settings import *; print(settings_table(), end="")' >
    # docs/training-arguments.md
    page = Path(__file__).parents[2] / "docs" / "training-arguments.md"
    assert page.read_text(encoding="utf-8") == settings_table()


def test_the_defaults_are_not_refused(tmp_path):
    refuse_unused(TrainingArguments(output_dir=str(tmp_path)), {"callbacks": []})


@pytest.mark.parametrize(
    "setting",
    [
        {"resume_from_checkpoint": "x/checkpoint-3"},
        {"train_sampling_strategy": "group_by_length"},
        {"label_names": ["labels"]},
        {"dataloader_in_order": False},
        {"length_column_name": "n"},
    ],
)
def test_a_setting_without_effect_is_refused(tmp_path, setting):
    with pytest.raises(MisuseError, match=f"training: {next(iter(setting))}: has no effect"):
        refuse_unused(TrainingArguments(output_dir=str(tmp_path), **setting), {})


@pytest.mark.parametrize("name", sorted(REFUSED_PARAMETERS))
def test_a_parameter_without_effect_is_refused(tmp_path, name):
    with pytest.raises(MisuseError, match=f"{name}: "):
        refuse_unused(TrainingArguments(output_dir=str(tmp_path)), {name: lambda *_: 0})


def test_fsdp_wants_ranks(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    args = TrainingArguments(output_dir=str(tmp_path))
    args.fsdp = True
    with pytest.raises(MisuseError, match=r"training: fsdp: .*torchrun"):
        refuse_unused(args, {})
    monkeypatch.setenv("RANK", "0")
    refuse_unused(args, {})


UNEVALUATED = [
    {"metric_for_best_model": "loss"},
    {"metric_for_best_model": "accuracy", "save_strategy": "best"},
    {"greater_is_better": True},
    {"eval_steps": 10},
    {"eval_delay": 2},
]


@pytest.mark.parametrize("setting", UNEVALUATED)
def test_what_chooses_by_an_evaluation_is_refused_where_none_is_due(tmp_path, setting):
    with pytest.raises(
        MisuseError, match=r"training: \w+: has no effect without evaluations.*set eval_strategy"
    ) as caught:
        refuse_unused(TrainingArguments(output_dir=str(tmp_path), **setting), {})
    assert any(f"training: {name}:" in str(caught.value) for name in setting)
    due = {"eval_strategy": "steps", **setting}
    refuse_unused(TrainingArguments(output_dir=str(tmp_path), **due), {})


@pytest.mark.parametrize("setting", [*UNEVALUATED, {"eval_strategy": "epoch"}, {"eval_on_start": True}])
def test_a_teacher_is_measured_at_its_end_alone(tmp_path, setting):
    with pytest.raises(MisuseError, match=r"training: \w+: .*a teacher is evaluated once, at the end.* leave it out"):
        refuse_evaluation(TrainingArguments(output_dir=str(tmp_path), **setting))
    refuse_evaluation(TrainingArguments(output_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("task", "metric", "labelled", "fits"),
    [
        ("sequence-classification", None, False, True),
        ("sequence-classification", "loss", False, True),
        ("sequence-classification", "eval_agreement", False, True),
        ("sequence-classification", "eval_macro_f1", True, True),
        ("sequence-classification", "macro_f1", False, False),
        ("sequence-classification", "f1", True, False),
        ("sequence-classification", "perplexity", True, False),
        ("causal-lm", "perplexity", True, True),
        ("causal-lm", "nll", True, True),
        ("causal-lm", "macro_f1", True, False),
    ],
)
def test_the_best_is_chosen_by_what_is_measured(tmp_path, task, metric, labelled, fits):
    args = TrainingArguments(output_dir=str(tmp_path), metric_for_best_model=metric)
    if fits:
        check_metric(args, get_task(task), 3, labelled=labelled)
        return
    with pytest.raises(
        MisuseError, match=r"metric_for_best_model: expected one of loss, .*divergence.*, found"
    ) as caught:
        check_metric(args, get_task(task), 3, labelled=labelled)
    assert ("no labels" in str(caught.value)) == (not labelled)
