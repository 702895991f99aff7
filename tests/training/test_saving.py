"""Files that a run writes.

Covers secrets, incomplete checkpoints, full disks, and pushes to the hub.
"""

from __future__ import annotations

import copy
import errno
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from transformers import Trainer, TrainingArguments

import pipeline as softlabel
from pipeline.cache import Cache
from pipeline.config import DataConfig, TrainStudentConfig, TrainTeacherConfig
from pipeline.errors import ConfigError, MisuseError, TrainingError
from pipeline.models.arguments import hide_token
from pipeline.training.run import run
from pipeline.training.teacher import run as train_teacher
from tests.conftest import tiny_model
from tests.support.hub import TOKEN, hub  # noqa: F401 - a fixture
from tests.support.once import once

SECRET = "hf_" + "sEcReT" * 5


@pytest.fixture
def teacher(bert_tokenizer, save_teacher):
    return save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=3), bert_tokenizer)


@pytest.fixture
def cache(tmp_path, teacher, topics) -> Cache:
    rows = topics["train"].select(range(24)).remove_columns("label")

    def make(folder: Path) -> None:
        softlabel.cache_logits(str(teacher), rows, folder / "cache", task="sequence-classification")

    once(__name__, make, tmp_path)
    return Cache.open(tmp_path / "cache")


def train(cache, student, output, **settings):
    settings = {"max_steps": 2, "batch_size": 8, **settings}
    return run(TrainStudentConfig(cache=str(cache.root), student=str(student), output=str(output), **settings))


def test_no_file_holds_the_token(tmp_path, cache, teacher):
    saving = {"save_strategy": "steps", "save_steps": 1, "hub_token": SECRET, "push_to_hub": False}
    train(cache, teacher, tmp_path / "out", training=saving)
    args = TrainingArguments(output_dir=str(tmp_path / "x"), hub_token=SECRET, max_steps=1)
    softlabel.train_student(cache, str(teacher), tmp_path / "live", args=args)
    assert args.hub_token == SECRET  # pushes read the token from there
    written = [path for name in ("out", "live") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert {"training_args.bin", "trainer_state.json", "README.md", "origin.json"} <= {path.name for path in written}
    assert (tmp_path / "out" / "checkpoint-1" / "training_args.bin").exists()
    for path in written:
        assert SECRET.encode() not in path.read_bytes(), path


def test_a_hidden_token_is_still_the_token(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), hub_token=SECRET)
    hide_token(args)
    assert isinstance(args.hub_token, str)
    assert (args.hub_token, copy.deepcopy(args).hub_token) == (SECRET, SECRET)
    torch.save(args, tmp_path / "args.bin")
    assert torch.load(tmp_path / "args.bin", weights_only=False).hub_token == ""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
    ],
)
def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_whole(tmp_path, cache, teacher, monkeypatch, error):
    plain = Trainer._save_optimizer_and_scheduler

    def full(self, output_dir):
        if output_dir.endswith("checkpoint-2"):
            raise error
        plain(self, output_dir)

    saving = {"save_strategy": "steps", "save_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(TrainingError, match=r"checkpoint-2: .*the disk is full.*--resume") as caught:
            train(cache, teacher, tmp_path / "out", training=saving)
        assert "\n" not in str(caught.value)
    assert train(cache, teacher, tmp_path / "out", training=saving, resume=True).steps == 2


def test_another_error_while_saving_is_not_taken_for_a_full_disk(tmp_path, cache, teacher, monkeypatch):
    def fails(self, output_dir):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", fails)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(cache, teacher, tmp_path / "out", training={"save_strategy": "steps", "save_steps": 1})


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"report_to": "wandb"}, "wandb"),
        ({"report_to": ["tensorboard", "mlflow"]}, "mlflow"),
        ({"report_to": "wandbb"}, "wandbb"),
        ({"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
        ({"optim": "paged_lion_8bit"}, "bitsandbytes"),
        ({"optim": "lomo"}, "lomo"),
        ({"optim": "schedule_free_adamw"}, "schedulefree"),
        ({"optim": "galore_adamw", "optim_target_modules": ["query"]}, "galore"),
    ],
)
def test_a_missing_package_is_said_before_anything_is_touched(tmp_path, cache, teacher, monkeypatch, training, message):
    find = importlib.util.find_spec
    names = ("wandb", "mlflow", "bitsandbytes", "lomo_optim", "schedulefree", "galore_torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in names else find(name, *a))
    with pytest.raises(ConfigError, match=rf"^training: .*{message}") as caught:
        train(cache, teacher, tmp_path / "out", training=training)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "origin.json").exists()


def test_a_push_without_a_hub_is_said_before_the_first_step(tmp_path, cache, teacher, monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise ConnectionError("Cannot reach https://huggingface.co/api/repos/create\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", unreachable)
    with pytest.raises(ConfigError, match=r"push_to_hub: the hub cannot be reached.*repos/create\); log in"):
        train(cache, teacher, tmp_path / "out", training={"push_to_hub": True})
    assert not (tmp_path / "out" / "origin.json").exists()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_what_is_pushed_is_what_is_saved(tmp_path, cache, teacher, hub, dtype):
    """Weights, tokenizer, cards and logs are pushed.

    Checkpoints are not, although one was pushed during training in float32.
    """
    training = {"push_to_hub": True, "hub_model_id": "org/student", "save_strategy": "steps", "save_steps": 1}
    train(cache, teacher, tmp_path / "out", save_dtype=dtype, training=training)
    saved = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    pushed = hub.files("org/student")
    assert saved == {name: content for name, content in pushed.items() if name != ".gitattributes"}
    assert {"model.safetensors", "tokenizer.json", "README.md", "distillation.json"} <= pushed.keys()
    found = {tensor.dtype for tensor in load(pushed["model.safetensors"]).values()}
    assert found == {torch.bfloat16 if dtype == "bfloat16" else torch.float32}
    assert hub.private == {"org/student": False}
    assert all(TOKEN.encode() not in content for content in pushed.values())


def test_an_adapter_and_a_teacher_are_pushed_whole(tmp_path, cache, teacher, hub, topics):
    pytest.importorskip("peft")
    training = {"push_to_hub": True, "hub_model_id": "org/adapter", "hub_private_repo": True}
    train(cache, teacher, tmp_path / "out", lora_r=2, lora_target=("query",), training=training)
    pushed = hub.files("org/adapter")
    assert {"adapter_model.safetensors", "adapter_config.json", "labels.json", "README.md"} <= pushed.keys()
    assert hub.private == {"org/adapter": True}
    topics["train"].to_json(tmp_path / "train.jsonl")
    train_teacher(
        TrainTeacherConfig(
            task="sequence-classification",
            model=str(teacher),
            output=str(tmp_path / "teacher2"),
            data=DataConfig(dataset=str(tmp_path / "train.jsonl")),
            max_steps=1,
            training={"push_to_hub": True, "hub_model_id": "org/teacher"},
        )
    )
    assert {"model.safetensors", "tokenizer.json", "README.md", "metrics.json"} <= hub.files("org/teacher").keys()


def test_a_push_that_fails_at_the_end_leaves_the_student(tmp_path, cache, teacher, hub):
    training = {"push_to_hub": True, "hub_model_id": "org/student", "hub_strategy": "end"}
    hub.fail_uploads_after = 0
    with pytest.raises(
        TrainingError, match=r"out: is finished and saved, and was not pushed to org/student: .*hf upload"
    ) as caught:
        train(cache, teacher, tmp_path / "out", training=training)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "out" / "distillation.json").is_file()


def test_the_best_of_a_metric_that_is_not_measured(tmp_path, cache, teacher):
    training = {"eval_strategy": "epoch", "save_strategy": "best", "metric_for_best_model": "f1"}
    with pytest.raises(MisuseError, match=r"found 'f1'; the split has no labels"):
        train(cache, teacher, tmp_path / "out", eval_split="train", training=training)
    assert not (tmp_path / "out" / "origin.json").exists()


def test_the_best_of_no_evaluation(tmp_path, cache, teacher):
    with pytest.raises(MisuseError, match=r"metric_for_best_model: has no effect without evaluations"):
        train(cache, teacher, tmp_path / "out", training={"metric_for_best_model": "loss"})
    with pytest.raises(MisuseError, match=r"^eval_on_start: the cache has no split `validation`"):
        train(cache, teacher, tmp_path / "out", training={"eval_on_start": True})
    never = {"eval_strategy": "no", "load_best_model_at_end": False}
    with pytest.raises(MisuseError, match=r"metric_for_best_model: has no effect"):  # not an assertion
        train(cache, teacher, tmp_path / "out", early_stopping=2, training=never)
    assert not (tmp_path / "out" / "origin.json").exists()
