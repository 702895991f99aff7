"""Features that users of Trainer expect: metrics, early stopping, schedules and clear errors."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, TrainerCallback

import pipeline as softlabel
from pipeline.config import TrainStudentConfig
from pipeline.errors import ContractError, EncodingError, MisuseError, TrainingError
from pipeline.models.arguments import training_arguments
from pipeline.records import Full, Loss, Sampled, TopK
from pipeline.tasks import get_task
from pipeline.training.batches.collate import Collator
from pipeline.training.run import run
from pipeline.training.schedule import weights_at
from tests.conftest import tiny_model
from tests.support.once import once
from tests.support.processes import ROOT, python, ranks
from tests.support.rows import block_from, token_row


@pytest.fixture
def cache(tmp_path, lm_tokenizer, documents):
    documents["validation"] = documents["test"]

    def make(folder: Path) -> None:
        teacher = tiny_model("llama", len(lm_tokenizer), spread=4.0)
        teacher.save_pretrained(folder / "teacher")
        lm_tokenizer.save_pretrained(folder / "teacher")
        softlabel.cache_logits(
            teacher, documents, folder / "cache", task="causal-lm", tokenizer=lm_tokenizer, max_length=32
        )

    once(__name__, make, tmp_path)
    return softlabel.Cache.open(tmp_path / "cache")


def config(cache, tmp_path: Path, **settings) -> TrainStudentConfig:
    student = tmp_path / "student"
    if not student.exists():
        softlabel.init_student(tmp_path / "teacher", student, layers=[0, 3])
    settings = {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-3, "output": str(tmp_path / "out"), **settings}
    return TrainStudentConfig(cache=str(cache.root), student=str(student), **settings)


def history(output: Path) -> list[dict]:
    newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return json.loads((newest / "trainer_state.json").read_text())["log_history"]


def test_metrics_during_training_are_those_of_an_evaluation(tmp_path, cache):
    training = {"eval_strategy": "steps", "eval_steps": 6, "save_steps": 6, "per_device_eval_batch_size": 3}
    run(config(cache, tmp_path, training=training))
    found = next(entry for entry in history(tmp_path / "out") if "eval_loss" in entry)
    report = softlabel.evaluate(cache, {"s": tmp_path / "out"}, split="validation").students[0]
    assert found["eval_nll"] == pytest.approx(report.metrics["loss"], rel=1e-5)
    assert found["eval_accuracy"] == pytest.approx(report.metrics["accuracy"])
    assert found["eval_bits_per_byte"] == pytest.approx(report.metrics["bits_per_byte"], rel=1e-5)
    assert found["eval_agreement"] == pytest.approx(report.agreement)
    assert found["eval_divergence"] == pytest.approx(report.kl, rel=1e-4)
    expected = 0.5 * found["eval_nll"] + 0.5 * found["eval_divergence"]
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_early_stopping_keeps_the_best(tmp_path, cache):
    """A growing learning rate degrades the student.

    The run stops early with the weights of its best evaluation.
    """
    settings = {"max_steps": -1, "epochs": 12, "learning_rate": 20.0, "early_stopping": 2}
    growing = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 400}
    result = run(config(cache, tmp_path, training=growing, **settings))
    entries = [entry for entry in history(tmp_path / "out") if "eval_loss" in entry]
    losses = [entry["eval_loss"] for entry in entries]
    assert len(losses) < 12
    assert result.steps == entries[-1]["step"]
    assert int(np.argmin(losses)) == len(losses) - 3
    report = softlabel.evaluate(cache, {"s": tmp_path / "out"}, split="validation").students[0]
    best = entries[int(np.argmin(losses))]
    assert report.metrics["loss"] == pytest.approx(best["eval_nll"], rel=1e-4)


def test_a_loss_that_is_not_finite_names_the_rows_and_keeps_the_checkpoint(tmp_path, cache):
    model = AutoModelForCausalLM.from_pretrained(config(cache, tmp_path).student)
    args = training_arguments(str(tmp_path / "o"), {"save_steps": 2}, max_steps=6, per_device_train_batch_size=4)
    trainer = softlabel.DistillationTrainer(model, args, cache=cache, loss=Loss())

    class Ruin(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    model.model.norm.weight.fill_(float("nan"))

    trainer.add_callback(Ruin())
    with pytest.raises(
        TrainingError, match=r"step 5, source rows \d+, \d+, \d+, \d+: expected a finite loss, found nan"
    ):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "o").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "o" / "checkpoint-4")
    assert all(parameter.isfinite().all() for parameter in kept.parameters())


def test_a_gradient_that_is_not_finite_stops_before_it_ruins_the_weights(tmp_path, cache):
    trainer = trainer_of(cache, tmp_path)
    trainer.model.model.norm.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainingError, match=r"step 1, source rows .*: expected a finite gradient"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("nll", False),
        ("divergence", False),
        ("accuracy", True),
        ("eval_agreement", True),
        ("loss", False),
        ("f1", True),
        ("ndcg@10", True),
        ("correlation", True),
        ("mse", False),
    ],
)
def test_the_best_model_is_the_best_by_its_metric(tmp_path, metric, greater):
    args = training_arguments(str(tmp_path), {"metric_for_best_model": metric}, max_steps=1)
    assert args.greater_is_better is greater
    args = training_arguments(str(tmp_path), {"metric_for_best_model": metric, "greater_is_better": not greater})
    assert args.greater_is_better is not greater


@pytest.mark.parametrize("ends", [(1.0, 0.0, 0.0, 1.0), (0.0, 1.0, 1.0, 0.0)])
def test_evaluations_under_a_schedule_can_be_compared(tmp_path, cache, ends):
    """Loss weights go to or from 0 during training.

    Every evaluation uses the same weights, also after the last step, and no term is omitted.
    """
    hard, soft, hard_end, soft_end = ends
    loss = Loss(hard, soft, schedule="cosine", hard_weight_end=hard_end, soft_weight_end=soft_end)
    args = training_arguments(str(tmp_path / "o"), {"save_strategy": "no"}, max_steps=3, per_device_train_batch_size=4)
    trainer = softlabel.DistillationTrainer(tiny_model("llama", len(cache.tokenizer)), args, cache=cache, loss=loss)
    for _ in range(2):
        found = trainer.evaluate()
        expected = found["eval_nll"] if hard else found["eval_divergence"]
        assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert found["eval_loss"] > 0
        trainer.train()


def test_a_schedule_that_ends_at_nothing_reaches_its_end(tmp_path, cache):
    loss = Loss(0.0, 1.0, schedule="cosine", soft_weight_end=0.0)
    args = training_arguments(str(tmp_path / "o"), {"save_strategy": "no"}, max_steps=3, per_device_train_batch_size=4)
    trainer = softlabel.DistillationTrainer(tiny_model("llama", len(cache.tokenizer)), args, cache=cache, loss=loss)
    trainer.train()
    assert trainer.state.global_step == 3


def test_predict_and_other_splits(tmp_path, cache):
    trainer = trainer_of(cache, tmp_path)
    found = trainer.predict(cache.dataset("test")).metrics
    assert found["test_nll"] == pytest.approx(trainer.evaluate(cache.dataset("test"))["eval_nll"])


@pytest.mark.parametrize("training", [{"label_smoothing_factor": 0.1}, {"dataloader_drop_last": True}])
def test_settings_that_would_do_nothing_are_refused(tmp_path, cache, training):
    with pytest.raises(MisuseError, match=f"training: {next(iter(training))}: has no effect"):
        trainer_of(cache, tmp_path, **training)


def test_an_evaluation_makes_no_gradient(tmp_path, cache, monkeypatch):
    from pipeline.training import fused

    seen = []
    plain = fused._chunk
    monkeypatch.setattr(
        fused, "_chunk", lambda *args, needs_grad: seen.append(needs_grad) or plain(*args, needs_grad=needs_grad)
    )
    trainer = trainer_of(cache, tmp_path)
    trainer.evaluate()
    assert seen
    assert not any(seen)
    trainer.train()
    assert any(seen)


def test_no_such_evaluation_split(tmp_path, cache):
    with pytest.raises(softlabel.PipelineError, match=r"no split 'dev'; the cache has train, test, validation"):
        run(config(cache, tmp_path, eval_split="dev", training={"eval_strategy": "epoch"}))


@pytest.mark.full
def test_early_stopping_goes_on_counting_after_a_resume(tmp_path, cache):
    """The run is killed after two evaluations without improvement, and resumed.

    The third one ends the run, as without the interruption.
    """
    settings = {"max_steps": -1, "epochs": 12, "learning_rate": 0.05, "early_stopping": 3}
    training = {"lr_scheduler_type": "constant", "save_total_limit": 20}
    whole = run(config(cache, tmp_path, training=training, **settings))
    saved = sorted((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert len(saved) >= 4
    shutil.rmtree(saved[-1])
    resumed = run(config(cache, tmp_path, training=training, resume=True, **settings))
    assert resumed.steps == whole.steps


def test_a_resumed_run_of_another_learning_rate_is_refused(tmp_path, cache):
    """The optimizer's state contains the old learning rate, which would stay in use."""
    run(config(cache, tmp_path, max_steps=2, training={"save_steps": 2}))
    with pytest.raises(softlabel.PipelineError, match=r"learning_rate: expected 0.001, found 0.0001"):
        run(config(cache, tmp_path, max_steps=4, learning_rate=1e-4, resume=True))


def test_a_checkpoint_of_weights_alone_is_not_resumed(tmp_path, cache):
    settings = {"max_steps": 2, "training": {"save_steps": 1, "save_only_model": True}}
    run(config(cache, tmp_path, **settings))
    with pytest.raises(ContractError, match="expected an optimizer state, found weights only"):
        run(config(cache, tmp_path, resume=True, **settings))


def trainer_of(cache, tmp_path: Path, **training):
    args = training_arguments(
        str(tmp_path / "o"), training, max_steps=2, per_device_train_batch_size=4, save_strategy="no"
    )
    return softlabel.DistillationTrainer(tiny_model("llama", len(cache.tokenizer)), args, cache=cache, loss=Loss())


def test_a_label_that_is_no_class_names_the_rows(tmp_path, cache):
    trainer = trainer_of(cache, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    batch["labels"][3] = 320
    with pytest.raises(TrainingError, match=r"step 1, source rows .*: hard label: expected 0 to 319 .*found 320"):
        trainer.compute_loss(trainer.model, batch)


def test_a_step_without_a_position_that_counts_is_refused(tmp_path, cache):
    trainer = trainer_of(cache, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(TrainingError, match=r"source rows .*nothing to train on"):
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.zeros(2))


def test_trainers_bfloat16_reaches_the_layers(tmp_path, cache):
    trainer = trainer_of(cache, tmp_path, bf16=True, use_cpu=True)
    seen = []
    trainer.model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_weights_follow_their_schedule_and_are_logged(tmp_path, cache):
    settings = {"hard_weight": 1.0, "soft_weight": 0.0, "hard_weight_end": 0.0, "soft_weight_end": 1.0}
    run(config(cache, tmp_path, weight_schedule="linear", training={"logging_steps": 1, "save_steps": 6}, **settings))
    entries = [entry for entry in history(tmp_path / "out") if "soft_weight" in entry]
    assert [entry["soft_weight"] for entry in entries] == pytest.approx([(i + 0.5) / 6 for i in range(6)])
    for entry in entries:
        mixed = entry["hard_weight"] * entry["hard_loss"] + entry["soft_weight"] * entry.get("soft_loss", 0.0)
        assert entry["loss"] == pytest.approx(mixed, rel=1e-4)


def test_schedules():
    linear = Loss(1.0, 0.2, schedule="linear", hard_weight_end=0.0)
    assert weights_at(linear, 0.25) == pytest.approx((0.75, 0.2))
    cosine = Loss(0.0, 1.0, schedule="cosine", soft_weight_end=0.5)
    assert [weights_at(cosine, t)[1] for t in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.75, 0.5])
    stable = Loss(0.0, 1.0, schedule="warmup-stable-decay")
    assert [weights_at(stable, t)[1] for t in (0.0, 0.05, 0.1, 0.5, 0.8, 0.9, 1.0)] == pytest.approx(
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0]
    )
    assert weights_at(Loss(0.3, 0.7), 0.9) == (0.3, 0.7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "linear"}, "--weight-schedule linear needs"),
        ({"soft_weight_end": 0.5}, "--weight-schedule"),
        ({"hard_weight": 0.0, "soft_weight": 0.0}, "expected one of them above 0"),
        ({"soft_weight": -1.0}, "--soft-weight: expected at least 0, found -1"),
        ({"divergence": "skewed-kl", "mixture": 1.0}, "--mixture: expected between 0 and 1"),
    ],
)
def test_bad_losses(settings, message):
    with pytest.raises(MisuseError, match=message):
        Loss(**settings)


def test_rows_of_similar_length_with_a_token_budget(tmp_path, cache):
    args = training_arguments(str(tmp_path / "o"), {}, per_device_train_batch_size=16, num_train_epochs=2)
    model = tiny_model("llama", len(cache.tokenizer))
    trainer = softlabel.DistillationTrainer(model, args, cache=cache, loss=Loss(), batch_tokens=96)
    shapes = [tuple(batch["inputs"]["input_ids"].shape) for batch in trainer.get_train_dataloader()]
    assert all(rows * length <= 96 for rows, length in shapes)
    assert sum(rows for rows, _ in shapes) == len(cache.dataset("train"))
    trainer.train()
    assert trainer.state.global_step == 2 * len(shapes)


@pytest.mark.parametrize("encoding", [Full(), TopK(4), Sampled(6.0)])
def test_positions_count_by_the_teachers_certainty(lm_tokenizer, encoding):
    row = token_row(0, encoding, 41)
    row = dataclasses.replace(row, entropy=torch.linspace(0.0, 3.0, len(row.soft)))
    block, flags = block_from(row, row), np.array([True, False])
    task = get_task("causal-lm")
    found = {
        kind: Collator(task, lm_tokenizer, 1.0, position_weights=kind).collate_block(block, flags).soft_weights
        for kind in ("equal", "certainty", "uncertainty")
    }
    count = len(row.soft)
    assert found["equal"].tolist() == [1.0] * count + [0.0] * count
    entropy = row.entropy
    if isinstance(encoding, Full):  # the full distribution is stored
        entropy = -(row.soft.top_logprobs.exp() * row.soft.top_logprobs).reshape(count, -1).sum(-1)
    share = entropy / np.log(41)
    torch.testing.assert_close(found["uncertainty"][:count], share, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["certainty"][:count], 1 - share, rtol=1e-3, atol=1e-4)
    assert not found["certainty"][count:].any()


def test_position_weights_need_the_entropy_of_each_position(tmp_path, cache):
    with pytest.raises(EncodingError, match=r"--position-weights certainty.*--store-entropy"):
        run(config(cache, tmp_path, position_weights="certainty"))


def test_tensorboard_gets_both_losses(tmp_path, cache):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training = {"report_to": "tensorboard", "logging_steps": 2}
    run(config(cache, tmp_path, training=training))
    events = EventAccumulator(str(next((tmp_path / "out").rglob("events*")).parent)).Reload()
    assert {"train/hard_loss", "train/soft_loss"} <= set(events.Tags()["scalars"])


def test_a_student_whose_embedding_is_smaller_than_the_vocabulary_is_refused(tmp_path, cache):
    """The input and output matrices, tied in the checkpoint, have different sizes."""
    model = AutoModelForCausalLM.from_pretrained(config(cache, tmp_path).student)
    model.model.embed_tokens = torch.nn.Embedding(100, 32)
    model.config.tie_word_embeddings = False
    with pytest.raises(softlabel.PipelineError, match=r"input embedding of 100 tokens.*expected at least 320"):
        softlabel.train_student(cache, model, tmp_path / "o")


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # of the compiler
def test_a_compiled_student_learns_what_a_plain_one_learns(tmp_path, cache):
    plain = run(config(cache, tmp_path))
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    result = run(config(cache, tmp_path, output=str(tmp_path / "compiled"), training=compiled))
    assert result.soft_loss == pytest.approx(plain.soft_loss, rel=1e-4)
    assert result.hard_loss == pytest.approx(plain.hard_loss, rel=1e-4)
    AutoModelForCausalLM.from_pretrained(tmp_path / "compiled")


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from pipeline.cli import main
from pipeline.training.trainer import DistillationTrainer
plain = DistillationTrainer.compute_loss
def compute_loss(self, *args, **kwargs):
    if self.state.global_step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, *args, **kwargs)
DistillationTrainer.compute_loss = compute_loss
main(["train-student", "--config", sys.argv[1]])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", [{"batch_tokens": 96}, {"training": {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1}}]
)
def test_a_run_killed_and_resumed_ends_with_the_weights_of_an_undisturbed_one(tmp_path, cache, extra):
    """SIGKILL arrives inside the eighth step, in the second epoch.

    Batches are sized by tokens, or accumulated from a worker process.
    """
    training = {"save_steps": 3, "lr_scheduler_type": "cosine", **extra.get("training", {})}
    settings = {**extra, "max_steps": 12, "batch_size": 4, "training": training}
    whole = config(cache, tmp_path, output=str(tmp_path / "whole"), **settings)
    run(whole)
    file = tmp_path / "run.yaml"
    names = ("cache", "student", "max_steps", "batch_size", "batch_tokens", "learning_rate", "training")
    section = {name: getattr(whole, name) for name in names if getattr(whole, name) is not None}
    file.write_text(yaml.safe_dump({"train-student": {**section, "output": str(tmp_path / "killed")}}))
    done = python("-c", KILLED, str(file))
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    resumed = run(dataclasses.replace(whole, output=str(tmp_path / "killed"), resume=True))
    assert resumed.steps == 12
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "killed"))
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.full
@pytest.mark.slow
def test_the_command_under_torchrun_saves_one_student_and_says_so_once(tmp_path, cache):
    """Runs under torchrun, then resumes on two of its ranks."""
    plain = config(cache, tmp_path)
    command = ["train-student", "--cache", *plain.cache, "--student", plain.student, "--output", plain.output]
    file = tmp_path / "run.yaml"
    file.write_text("train-student: {max_steps: 4, batch_size: 4, training: {save_steps: 2, use_cpu: true}}")
    command = ["-m", "pipeline", *command, "--config", str(file)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first = [subprocess.run([*launch, *command], capture_output=True, text=True, env=environment)]
    for steps, done in ((4, first), (6, ranks(2, *command, "--resume", "--max-steps", "6"))):
        assert all(process.returncode == 0 for process in done), "".join(p.stderr[-2000:] for p in done)
        said = "".join(process.stdout for process in done)
        assert said.count("student: ") == 1
        assert f"{steps} steps" in said
        AutoModelForCausalLM.from_pretrained(plain.output)
