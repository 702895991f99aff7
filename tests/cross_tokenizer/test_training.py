"""Students with another tokenizer, from the capture to the trained student."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.capture.run import run as capture
from pipeline.config import TrainStudentConfig
from pipeline.training.run import run as train
from tests.conftest import WORDS, tiny_model
from tests.support.captures import config  # noqa: F401
from tests.tasks.families import FAMILIES


def byte_level(size: int, *, eos: str = "<end>") -> PreTrainedTokenizerFast:
    """A byte-level BPE of another size, whose special tokens have other ids and names."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unused>", "<pad>", eos]
    raw.train_from_iterator(
        [" ".join(WORDS)] * 3,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token=eos, model_max_length=512)


@pytest.fixture(autouse=True)
def own_cache_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def cached(config):
    return capture(config("cache"))


def student(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str = "small", **settings: int) -> Path:
    path = tmp_path / name
    tiny_model("llama", len(tokenizer), seed=3, **settings).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def train_config(tmp_path: Path, path: Path, output: str = "out", **settings: object) -> TrainStudentConfig:
    fields: dict[str, object] = {
        "learning_rate": 3e-3,
        "epochs": 3,
        "batch_size": 8,
        "seed": 0,
        "training": {"logging_steps": 5},
        **settings,
    }
    return TrainStudentConfig(
        cache=(str(tmp_path / "cache"),), student=str(path), output=str(tmp_path / output), **fields
    )


@pytest.mark.parametrize("name", ["smaller", "llama2", "bert"])
def test_a_student_with_another_tokenizer_learns(tmp_path, cached, caplog, name):
    tokenizer = byte_level(290) if name == "smaller" else FAMILIES[name]
    path = student(tmp_path, tokenizer)
    with caplog.at_level(logging.INFO, logger="pipeline"):
        found = train(train_config(tmp_path, path))
    assert "another tokenizer than the cache's" in caplog.text
    assert found.soft_loss is not None
    assert np.isfinite(found.soft_loss)
    log = [e for e in json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"] if "loss" in e]
    assert log[-1]["loss"] < log[0]["loss"]
