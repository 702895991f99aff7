"""Training options also work for a student with another tokenizer.

Covers resuming, mixtures, position weights, adapters and URLs.
"""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.cache.format.codec import unpack_soft
from pipeline.capture.run import run as capture
from pipeline.config import PredictConfig, TrainStudentConfig
from pipeline.cross_tokenizer.opening import cache_for
from pipeline.errors import ContractError
from pipeline.evaluation import evaluate
from pipeline.models.predict import run as predict
from pipeline.records import NO_LABEL, TrainResult
from pipeline.softlabels import most_likely
from pipeline.tasks import get_task
from pipeline.training.batches.collate import Collator
from pipeline.training.run import run as train
from pipeline.training.trainer import DistillationTrainer
from tests.conftest import tiny_model
from tests.cross_tokenizer.test_training import byte_level, cached, own_cache_directory, student, train_config
from tests.support.captures import config
from tests.support.flaky import flaky

__all__ = ["cached", "config", "flaky", "own_cache_directory"]


@pytest.fixture
def path(tmp_path):
    return student(tmp_path, byte_level(290))


def losses(output) -> dict[int, tuple[float, float]]:
    """The hard and the soft loss of every logged step."""
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: (entry["hard_loss"], entry["soft_loss"]) for entry in log if "hard_loss" in entry}


def short(tmp_path, path, output: str = "out", **settings) -> TrainStudentConfig:
    """The configuration of a run with four logged steps."""
    fields = {"epochs": None, "max_steps": 4, "training": {"logging_steps": 1}, **settings}
    return train_config(tmp_path, path, output, **fields)


def collators(view, **settings) -> Collator:
    tokenizer = view.tokenizer
    return Collator(get_task("causal-lm"), tokenizer, 1.0, pad_id=1, vocabulary_map=view.vocabulary_map, **settings)


@pytest.mark.usefixtures("cached")
def test_a_stopped_run_goes_on_where_it_was(tmp_path, path, monkeypatch):
    settings = {"max_steps": 6, "training": {"logging_steps": 1, "save_strategy": "steps", "save_steps": 2}}
    train(short(tmp_path, path, "whole", **settings))
    plain, steps = DistillationTrainer.compute_loss, []

    def stop(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(DistillationTrainer, "compute_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            train(short(tmp_path, path, "stopped", **settings))
    found = train(short(tmp_path, path, "stopped", resume=True, **settings))
    assert found.steps == 6
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_positions_count_by_the_certainty_of_the_teacher_where_both_begin(tmp_path, config, path):
    cached = capture(config("cache", store_entropy=True))
    view = cache_for(cached, str(path), "train")
    collator = collators(view, position_weights="certainty")
    most = math.log(cached.manifest.contract.num_classes)
    some = 0
    for original, block in zip(cached.dataset("train").blocks(8), view.dataset("train").blocks(8), strict=True):
        entropy = original.lists["entropy"]
        expected = []
        for row in range(len(block)):
            where = block.lists["teacher_position"]
            mine = where.values[where.offsets[row] : where.offsets[row + 1]]
            theirs = entropy.values[entropy.offsets[row] : entropy.offsets[row + 1]].astype(np.float64)
            expected += [0.0 if i < 0 else 1 - theirs[i] / most for i in mine.tolist()]
        found = collator.collate_block(block).soft_weights.numpy()
        np.testing.assert_allclose(found, np.clip(expected, 0, 1), atol=1e-6)
        some += int(((found > 0) & (found < 1)).sum())
    assert some > 100
    assert np.isfinite(train(short(tmp_path, path, position_weights="certainty")).soft_loss)


def test_hard_labels_of_the_teacher_are_its_likeliest_token_in_the_students(tmp_path, cached, path):
    view = cache_for(cached, str(path), "train")
    collator = collators(view, teacher_labels=True)
    first_token = view.vocabulary_map.first_token
    for original, block in zip(cached.dataset("train").blocks(8), view.dataset("train").blocks(8), strict=True):
        best = most_likely(unpack_soft(original))[0].numpy()
        where = block.lists["teacher_position"]
        before = np.repeat(original.lists["top_count"].offsets[:-1], where.counts)
        expected = np.where(where.values < 0, NO_LABEL, first_token[best[where.values.clip(0) + before]])
        assert collator.collate_block(block).labels.tolist() == expected.tolist()
        assert (expected == NO_LABEL).any()
    found = train(short(tmp_path, path, hard_labels="teacher", soft_weight=0.0, hard_weight=1.0))
    assert np.isfinite(found.hard_loss)


@pytest.mark.usefixtures("cached")
def test_batches_end_by_the_students_tokens(tmp_path, path, monkeypatch):
    plain, shapes = DistillationTrainer.compute_loss, []

    def watch(self, model, inputs, *args, **kwargs):
        if model.training:
            shapes.append(tuple(inputs["inputs"]["input_ids"].shape))
        return plain(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", watch)
    train(short(tmp_path, path, batch_size=40, batch_tokens=200, max_steps=None, epochs=1))
    assert sum(rows for rows, _ in shapes) >= 40
    assert all(rows * length <= 200 or rows == 1 for rows, length in shapes)
    assert len({length for _, length in shapes}) > 3


@pytest.mark.usefixtures("cached")
def test_an_adapter_on_such_a_student(tmp_path, path):
    found = train(short(tmp_path, path, lora_r=4))
    assert 0 < found.num_trainable < found.num_parameters
    report = evaluate(tmp_path / "cache", {"adapter": str(tmp_path / "out")}, split="test")
    assert report.main_metric == "bits_per_byte"
    assert np.isfinite(report.students[0].metrics["bits_per_byte"])


@pytest.mark.usefixtures("cached")
def test_predict_needs_nothing(tmp_path, path):
    train(short(tmp_path, path))
    found = list(predict(PredictConfig(model=str(tmp_path / "out"), text=("the cat",), max_new_tokens=3)))
    assert found[0].continuation is not None


def test_a_cache_behind_a_url(tmp_path, cached, path, flaky):
    train(short(tmp_path, path, "local"))
    url = short(tmp_path, path, "there", cache_dir=str(tmp_path / "fetched"))
    train(dataclasses.replace(url, cache=(f"flaky://{cached.root}",)))
    assert losses(tmp_path / "there") == losses(tmp_path / "local")
    assert flaky.log


def mixed(tmp_path, path, output, kind, others) -> TrainResult:
    caches = tuple(str(tmp_path / name) for name in ("cache", *others))
    return train(dataclasses.replace(short(tmp_path, path, output), mix=kind, cache=caches))


@pytest.mark.full
def test_two_teachers_of_one_tokenizer(tmp_path, cached, config, path, save_teacher):
    """Two equal teachers give the losses of one; a different second one changes the soft loss."""
    capture(config("again", rows_per_shard=20))
    other = save_teacher(tiny_model("llama", len(cached.tokenizer), seed=8, spread=3.0), cached.tokenizer, "other")
    capture(dataclasses.replace(config("second"), teacher=str(other)))
    train(short(tmp_path, path, "one"))
    mixed(tmp_path, path, "same", "teachers", ["again"])
    mixed(tmp_path, path, "two", "teachers", ["second"])
    one, same, two = (losses(tmp_path / name) for name in ("one", "same", "two"))
    assert len(one) == 4
    for step, terms in one.items():
        assert same[step] == pytest.approx(terms, rel=1e-5)
    assert two[1][0] == pytest.approx(one[1][0], rel=1e-5)  # hard labels are the same
    assert two[1][1] != pytest.approx(one[1][1], rel=1e-3)


@pytest.mark.full
def test_two_caches_of_different_data(tmp_path, cached, config, path):
    capture(config("again", rows_per_shard=20))
    found = mixed(tmp_path, path, "out", "data", ["again"])
    assert found.rows == 2 * len(cached.dataset("train"))
    alone = train(short(tmp_path, path, "one"))
    assert found.own_tokenizer.positions == 2 * alone.own_tokenizer.positions
    assert np.isfinite(found.soft_loss)


def test_teachers_of_different_tokenizers_are_refused(tmp_path, cached, config, path, save_teacher):
    assert cached
    tokenizer = byte_level(300)
    other = save_teacher(tiny_model("llama", len(cached.tokenizer), seed=8), tokenizer, "other")
    capture(dataclasses.replace(config("second"), teacher=str(other)))
    for kind in ("data", "teachers"):
        with pytest.raises(ContractError, match=r"one student cannot learn from both") as caught:
            mixed(tmp_path, path, "out", kind, ["second"])
        assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("cached")
def test_the_card_says_how_the_tokens_meet(tmp_path, path):
    found = train(short(tmp_path, path))
    own = found.own_tokenizer
    assert own.vocabulary_size == 290
    assert 0 < own.agreeing <= own.aligned < own.positions
    text = (tmp_path / "out" / "README.md").read_text()
    assert (
        f"its own, of 290 tokens, not the teacher's: {own.aligned / own.positions:.1%} of its {own.positions:,}" in text
    )
    assert "`--align map`" in text
    kept = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert kept["own_tokenizer"] == dataclasses.asdict(own)
    if found.metrics:
        assert "between tokenizers compare `bits_per_byte`" in text
