"""The default training settings follow from the data and models, within bounds."""

from __future__ import annotations

import pytest

from pipeline.records import Full, Sampled, TopK, TopP
from pipeline.training.recipe.defaults import (
    Situation,
    choose_batch_size,
    choose_learning_rate,
    choose_loss,
    choose_steps,
    choose_teacher_arguments,
    evaluation_steps,
)


def known(**facts) -> Situation:
    plain = {
        "predicts_tokens": False,
        "start": "layers",
        "num_parameters": 15_000_000,
        "rows": 5000,
        "encoding": Full(),
    }
    return Situation(**{**plain, **facts})


def test_random_weights_take_larger_steps_than_trained_ones_and_large_models_smaller_ones():
    starts = ("random", "layers", "pretrained")
    rates = {start: choose_learning_rate(known(start=start, num_parameters=4_000_000))[0] for start in starts}
    assert rates["random"] > rates["layers"] >= rates["pretrained"]
    for start in ("random", "layers", "pretrained"):
        small, large = (choose_learning_rate(known(start=start, num_parameters=n))[0] for n in (2e6, 1e9))
        assert small > large


@pytest.mark.parametrize("rows", [1, 40, 5000, 10_000_000])
@pytest.mark.parametrize("start", ["random", "layers"])
def test_few_rows_are_repeated_and_many_are_seen(rows, start):
    batch, _ = choose_batch_size(known(rows=rows))
    steps, reason = choose_steps(known(rows=rows, start=start), batch)
    epoch = -(-rows // batch)
    assert 3 * epoch <= steps <= 100 * epoch
    assert f"{rows:,} row" in reason


def test_a_language_model_repeats_its_rows_less_often():
    for rows in (10, 1000, 1_000_000):
        steps = [choose_steps(known(rows=rows, predicts_tokens=tokens), 16)[0] for tokens in (False, True)]
        assert steps[1] <= steps[0]
        assert steps[1] <= 10 * -(-rows // 16)


def test_evaluations_take_no_more_than_a_part_of_the_run():
    """An evaluation of r rows takes the time of about r / 3 rows of training."""
    for steps in (4, 20, 500, 100_000):
        for rows in (1, 200, 50_000):
            every = evaluation_steps(steps, rows, 32)
            assert 1 <= every <= max(1, steps // 4)
            if every < steps // 4:
                assert rows / 3 <= every * 32 / 6 + 1


@pytest.mark.parametrize(
    ("encoding", "temperature"),
    [(Full(), 2.0), (Sampled(25.0, 1.5), None), (TopK(5, (1.0, 4.0)), 2.0), (TopP(0.9, (3.0, 4.0)), 3.0)],
)
def test_the_temperature_is_one_that_the_cache_serves(encoding, temperature):
    loss, _ = choose_loss(encoding, predicts_tokens=False)
    if loss.divergence == "logit-mse":
        assert isinstance(encoding, Full)
    else:
        assert loss.temperature == temperature


def test_a_language_model_is_trained_at_temperature_one_or_the_caches_own():
    assert choose_loss(Sampled(25.0), predicts_tokens=True)[0].temperature is None


def test_what_is_said_of_a_teacher_stays():
    given = {"learning_rate": 0.5, "per_device_train_batch_size": 4, "num_train_epochs": None, "max_steps": 7}
    found, choices = choose_teacher_arguments("pretrained", 1, 100, given)
    assert found == {"learning_rate": 0.5, "per_device_train_batch_size": 4, "max_steps": 7}
    assert choices == ()


@pytest.mark.parametrize(("rows", "epochs"), [(100_000, 3.0), (16 * 100, 5.0), (30, 10.0)])
def test_a_teacher_of_few_rows_sees_them_more_often(rows, epochs):
    nothing = dict.fromkeys(("learning_rate", "per_device_train_batch_size", "num_train_epochs", "max_steps"))
    found, choices = choose_teacher_arguments("pretrained", 22_000_000, rows, nothing)
    assert found["num_train_epochs"] == epochs
    assert [choice.name for choice in choices] == ["learning rate", "epochs"]
