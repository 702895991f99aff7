"""Unset training options are chosen and reported with a reason; any flag overrides them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

import pipeline as softlabel
from pipeline.cache import Cache
from pipeline.config import TrainStudentConfig
from pipeline.errors import CacheError, MisuseError
from pipeline.records import Full, Loss, TopK
from pipeline.training.recipe.make import make_recipe
from pipeline.training.run import run
from pipeline.training.student import load_student
from tests.conftest import WORDS
from tests.support.classifier import classifier
from tests.support.once import once


@pytest.fixture
def cache(tmp_path, bert_tokenizer, save_teacher) -> Cache:
    """Return a cache with 500 rows of train (200 labelled) and 100 of test, without validation."""

    def make(folder: Path) -> None:
        teacher = save_teacher(classifier(bert_tokenizer), bert_tokenizer)
        generator = np.random.default_rng(0)
        texts = [" ".join(generator.choice(WORDS, 6)) for _ in range(600)]
        labels = [("sport", "film")[i % 2] if i % 5 < 2 else None for i in range(600)]
        rows = Dataset.from_dict({"text": texts, "label": labels})
        data = DatasetDict({"train": rows.select(range(500)), "test": rows.select(range(500, 600))})
        for name, encoding in (("cache", Full()), ("top", TopK(2, (3.0, 4.0)))):
            softlabel.cache_logits(str(teacher), data, folder / name, task="sequence-classification", encoding=encoding)
        softlabel.init_student(teacher, folder / "student", config=softlabel.Shape(1, 16, 2))

    once(__name__, make, tmp_path)
    return Cache.open(tmp_path / "cache")


def config(tmp_path: Path, **flags) -> TrainStudentConfig:
    settings = {"cache": str(tmp_path / "cache"), "student": str(tmp_path / "student"), "output": str(tmp_path / "o")}
    return TrainStudentConfig(**{**settings, **flags})


def recipe(tmp_path: Path, cache: Cache, **flags):
    student = load_student(cache.manifest.contract, str(tmp_path / "student"))
    return make_recipe(config(tmp_path, **flags), cache, student, None)


def test_everything_is_chosen_where_no_flag_is_given(tmp_path, cache):
    found = recipe(tmp_path, cache)
    said = {choice.name: str(choice) for choice in found.choices}
    assert list(said) == ["loss", "learning rate", "batch size", "steps", "early stopping"]
    assert "random weights" in said["learning rate"]
    rows = cache.manifest.split_shards("train")[0].rows
    assert f"{rows:,} rows" in said["steps"]
    assert f"{rows // 10} rows held out of train by content" in said["early stopping"]
    assert found.held_out.num_measured == rows // 10
    assert found.early_stopping == 5
    assert found.arguments["eval_steps"] == found.arguments["save_steps"] < found.arguments["max_steps"]
    assert found.arguments["load_best_model_at_end"] is True


@pytest.mark.parametrize(
    ("flags", "name", "field", "value"),
    [
        ({"learning_rate": 0.5}, "learning rate", "learning_rate", 0.5),
        ({"batch_size": 3}, "batch size", "per_device_train_batch_size", 3),
        ({"epochs": 2.0}, "steps", "num_train_epochs", 2.0),
        ({"max_steps": 7}, "steps", "max_steps", 7),
    ],
)
def test_a_flag_overrides_its_choice_and_no_other(tmp_path, cache, flags, name, field, value):
    found = recipe(tmp_path, cache, **flags)
    assert found.arguments[field] == value
    assert name not in {choice.name for choice in found.choices}
    assert "loss" in {choice.name for choice in found.choices}


@pytest.mark.parametrize("length", [{"epochs": 2.0}, {"max_steps": 7}, {"training": {"num_train_epochs": 2}}])
def test_a_length_that_is_given_is_trained_to_its_end(tmp_path, cache, length):
    found = recipe(tmp_path, cache, **length)
    assert (found.early_stopping, found.held_out) == (None, None)
    assert "eval_strategy" not in found.arguments
    assert "early stopping" not in {choice.name for choice in found.choices}


def test_a_field_of_the_training_section_is_not_called_chosen(tmp_path, cache):
    found = recipe(tmp_path, cache, training={"learning_rate": 0.1, "per_device_train_batch_size": 4})
    assert {choice.name for choice in found.choices} == {"loss", "steps", "early stopping"}


def test_more_rows_a_step_are_fewer_steps_a_pass(tmp_path, cache):
    plain = recipe(tmp_path, cache, batch_size=8)
    accumulated = recipe(tmp_path, cache, batch_size=2, training={"gradient_accumulation_steps": 4})
    assert plain.arguments["max_steps"] == accumulated.arguments["max_steps"]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"early_stopping": 0}, "--early-stopping 0"),
        ({"training": {"save_strategy": "no"}}, "the training: section"),
    ],
)
def test_a_run_that_cannot_stop_early_says_why(tmp_path, cache, flags, reason):
    found = recipe(tmp_path, cache, **flags)
    (said,) = [choice for choice in found.choices if choice.name == "early stopping"]
    assert said.value == "none"
    assert reason in said.reason
    assert found.held_out is None


def test_a_control_on_labels_is_measured_on_labelled_rows(tmp_path, cache):
    labelled = ~np.isnan(cache.dataset("train").column("label").astype(float))
    found = recipe(tmp_path, cache, hard_weight=1.0, soft_weight=0.0)
    assert found.held_out.num_measured == int(labelled.sum()) // 10
    assert not (found.held_out.measured & ~labelled).any()
    assert found.arguments["metric_for_best_model"] == "loss"
    teacher = recipe(tmp_path, cache, hard_weight=1.0, soft_weight=0.0, hard_labels="teacher")
    assert teacher.arguments["metric_for_best_model"] == "agreement"


def test_the_split_that_is_named_is_measured_on(tmp_path, cache):
    found = recipe(tmp_path, cache, eval_split="test")
    assert found.held_out is None
    (said,) = [choice for choice in found.choices if choice.name == "early stopping"]
    assert "on test, 100 rows" in said.reason


def test_an_early_stopping_that_is_asked_for_is_not_dropped(tmp_path, cache):
    training = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}
    found = recipe(tmp_path, cache, early_stopping=3, training=training, eval_split="test")
    assert found.early_stopping == 3
    assert found.arguments["load_best_model_at_end"] is True
    every = recipe(tmp_path, cache, training={"save_steps": 7})
    assert (every.arguments["eval_steps"], every.early_stopping) == (7, 5)


def test_a_split_that_is_named_is_never_replaced(tmp_path, cache):
    """Holds also for a training split, which causes a warning, and for a missing split."""
    assert recipe(tmp_path, cache, eval_split="train").held_out is None
    with pytest.raises(CacheError, match="no split 'dev'"):
        recipe(tmp_path, cache, eval_split="dev")


def test_a_token_budget_counts_in_the_steps(tmp_path, cache):
    few, many = (recipe(tmp_path, cache, batch_tokens=tokens).arguments["max_steps"] for tokens in (8, 4096))
    epoch = cache.manifest.split_shards("train")[0].rows
    assert few >= 3 * epoch
    assert few > many


def test_a_temperature_is_chosen_that_the_cache_serves(tmp_path, cache):
    found = recipe(tmp_path, Cache.open(tmp_path / "top"))
    assert found.loss.temperature == 3.0


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr("pipeline.training.recipe.make.choose_steps", lambda known, rows_per_step: (60, "a test"))


def test_the_run_is_as_it_was_said(tmp_path, cache, caplog, short):
    """Held-out rows are not trained on, the best weights are kept, and choices are logged first."""
    with caplog.at_level(logging.INFO, logger="pipeline"):
        result = run(config(tmp_path, batch_size=16, learning_rate=1e-3))
    lines = [record.getMessage() for record in caplog.records]
    assert any("steps at most" in line for line in lines)
    held_out = recipe(tmp_path, cache, batch_size=16).held_out
    assert (result.eval_split, result.eval_rows) == ("train (held out)", held_out.num_measured)
    assert result.rows == int(held_out.left.sum())
    assert result.best_step is not None
    assert result.steps <= result.most_steps
    state = json.loads((tmp_path / "o" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert result.best_step == min(losses, key=losses.get)
    assert result.metrics["loss"] == pytest.approx(losses[result.best_step], rel=1e-4)


@pytest.mark.full
def test_python_chooses_as_the_command_does(tmp_path, cache, short):
    by_hand = run(config(tmp_path, output=str(tmp_path / "a")))
    by_api = softlabel.train_student(cache, tmp_path / "student", tmp_path / "b")
    assert by_api.metrics == by_hand.metrics
    assert (by_api.steps, by_api.loss, by_api.learning_rate) == (by_hand.steps, by_hand.loss, by_hand.learning_rate)


def test_a_negative_patience_is_refused():
    with pytest.raises(MisuseError, match="--early-stopping: expected at least 0"):
        TrainStudentConfig(cache="c", student="s", output="o", early_stopping=-1)


def test_a_loss_of_the_callers_own_is_not_called_chosen(tmp_path, cache):
    student = load_student(cache.manifest.contract, str(tmp_path / "student"))
    found = make_recipe(config(tmp_path), cache, student, None, loss=Loss(1.0, 0.0))
    assert found.loss == Loss(1.0, 0.0)
    assert "loss" not in {choice.name for choice in found.choices}
