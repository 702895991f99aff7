"""Two processes over gloo: the same losses as one, and bitwise equal ranks."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

import pipeline as softlabel
from pipeline.config import TrainStudentConfig
from pipeline.errors import MisuseError
from pipeline.training.run import run as train_student
from pipeline.training.saving import SavingTrainer
from tests.conftest import tiny_model
from tests.support import processes
from tests.support.processes import python, torchrun

SCRIPT = """
import hashlib, json, os, sys, torch
torch.set_num_threads(1)
import pipeline as softlabel
from pipeline.models.arguments import training_arguments
from pipeline.tasks import get_task
cache, student, output, batch, extra = sys.argv[1:]
cache = softlabel.Cache.open(cache)
settings = {"max_steps": 12, "per_device_train_batch_size": int(batch), "learning_rate": 1e-3, "save_strategy": "no", "use_cpu": True}
extra = json.loads(extra)
loss = softlabel.Loss(0.5, 0.5, span_weight=extra.pop("span_weight", 0.0))
args = training_arguments(output, {"logging_steps": 1, **settings, **extra})
model = get_task(cache.manifest.contract.task).auto_class.from_pretrained(student)
trainer = softlabel.DistillationTrainer(model, args, cache=cache, loss=loss)
if loss.span_weight:
    from tests.support.spans import with_spans
    with_spans(trainer)
digests = []
class Watch(__import__("transformers").TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        if not trainer.is_fsdp_enabled:  # whose ranks hold different parts
            digests.append(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())
trainer.add_callback(Watch())
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
spans = [entry["span_loss"] for entry in trainer.state.log_history if "span_loss" in entry]
found = {"world_size": args.world_size, "digests": digests, "losses": losses, "spans": spans, "metrics": trainer.evaluate()}
with open(f"{output}-{args.process_index}.json", "w") as file:
    json.dump(found, file)
"""


def train(tmp_path: Path, cache: Path, ranks: int, batch: int, **extra) -> list[dict]:
    """Train on several ranks, and return each rank's results; test_trainer covers torchrun."""
    output = tmp_path / f"out-{ranks}-{len(extra)}"
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    arguments = [str(cache), str(tmp_path / "student"), str(output), str(batch), json.dumps(extra)]
    for done in processes.ranks(ranks, str(script), *arguments) if ranks > 1 else [python(str(script), *arguments)]:
        assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(f"{output}-{rank}.json").read_text()) for rank in range(ranks)]


def assert_alike(found: list[dict], expected: dict) -> None:
    assert [rank["world_size"] for rank in found] == [len(found)] * len(found)
    assert all(rank["digests"] == found[0]["digests"] for rank in found)  # bitwise equal after every step
    assert found[0]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for name in ("eval_loss", "eval_accuracy", "eval_agreement", "eval_divergence"):
        assert found[0]["metrics"][name] == pytest.approx(expected["metrics"][name], rel=1e-4)


SIGNALLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from transformers import TrainerCallback
from pipeline.cli import main
from pipeline.training import run

class Signal(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        to, step = os.environ["SIGNALLED"].split()
        if state.global_step == int(step) and args.process_index == 1:
            os.kill(os.getppid() if to == "launcher" else os.getpid(), signal.SIGTERM)

plain = run.DistillationTrainer.__init__
def init(self, *args, **kwargs):
    plain(self, *args, **kwargs)
    self.add_callback(Signal())
run.DistillationTrainer.__init__ = init
main(sys.argv[1:])
"""


@pytest.mark.full
@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_of_all_ranks_and_the_same_command_goes_on(
    tmp_path, lm_tokenizer, documents, save_teacher
):
    """SIGTERM goes to one rank, then to the launcher, which forwards it; no checkpoint is due."""
    teacher = tiny_model("llama", len(lm_tokenizer), spread=4.0)
    softlabel.cache_logits(
        teacher, documents, tmp_path / "cache", task="causal-lm", tokenizer=lm_tokenizer, max_length=32
    )
    student = save_teacher(tiny_model("llama", len(lm_tokenizer), seed=1, num_hidden_layers=1), lm_tokenizer, "student")
    script, out = tmp_path / "train.py", tmp_path / "out"
    script.write_text(SIGNALLED)

    def start(signalled: str) -> CompletedProcess[str]:
        named = ["--cache", str(tmp_path / "cache"), "--student", str(student), "--output", str(out)]
        command = [str(script), "train-student", *named, "--max-steps", "6", "--batch-size", "2"]
        return torchrun(2, *command, env={"SIGNALLED": signalled})

    for signalled, step, before in (("rank 1", 2, None), ("launcher 3", 4, 2)):
        stopped = start(signalled)
        assert stopped.returncode != 0
        assert stopped.stderr.count(f"saved checkpoint-{step}") == 1, stopped.stderr
        assert stopped.stderr.count("Error: interrupted; what was finished is kept") == 2  # once for each rank
        assert (f"resuming from checkpoint-{before}" in stopped.stderr) == (before is not None)
        assert json.loads((out / f"checkpoint-{step}" / "trainer_state.json").read_text())["global_step"] == step
        assert len(list((out / f"checkpoint-{step}").glob("rng_state_*.pth"))) == 2
        assert not (out / "distillation.json").exists()
    done = start("rank -1")
    assert done.returncode == 0, done.stderr
    assert "resuming from checkpoint-4" in done.stderr
    alone = {"max_steps": 6, "batch_size": 4, "output": str(tmp_path / "alone")}
    train_student(TrainStudentConfig(cache=(str(tmp_path / "cache"),), student=str(student), **alone))
    assert json.loads((out / "distillation.json").read_text())["steps"] == 6
    found, expected = (load_file(path / "model.safetensors") for path in (out, tmp_path / "alone"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def test_ranks_that_know_nothing_of_each_other_are_refused(tmp_path, monkeypatch):
    """Trainer arguments under torchrun that do not request the CPU are refused.

    Each rank would otherwise train alone into the same directory.
    """
    args = TrainingArguments(output_dir=str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MisuseError, match=r"torchrun has started 2 ranks .*train separately.*set use_cpu"):
        SavingTrainer(tiny_model("gpt2", 40), args)


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path, bert_tokenizer, topics):
    """Uses global batches of 8 over 90 rows, every fifth without a label.

    The ranks have unequal counts of labels, and the last step contains a filler.
    """
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3, spread=4.0)
    model.config.id2label = {0: "business", 1: "sport", 2: "film"}
    topics["validation"] = topics["test"]
    cache = softlabel.cache_logits(
        model, topics, tmp_path / "cache", task="sequence-classification", tokenizer=bert_tokenizer
    )
    student = tiny_model(
        "bert", len(bert_tokenizer), num_labels=3, seed=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    student.save_pretrained(tmp_path / "student")
    found = train(tmp_path, cache.root, 2, 4)
    assert len(found[0]["digests"]) == 12
    assert_alike(found, train(tmp_path, cache.root, 1, 8)[0])


@pytest.mark.full
@pytest.mark.slow
def test_two_ranks_of_a_language_model_train_as_one_that_accumulates(tmp_path, lm_tokenizer, documents):
    """Checks the fused loss under DDP and FSDP.

    Rows have 3 to 60 words, so that the ranks have unequal numbers of positions.
    """
    documents["validation"] = documents["test"]
    teacher = tiny_model("llama", len(lm_tokenizer), spread=4.0)
    cache = softlabel.cache_logits(
        teacher, documents, tmp_path / "cache", task="causal-lm", tokenizer=lm_tokenizer, max_length=32
    )
    tiny_model("llama", len(lm_tokenizer), seed=1, spread=2.0, num_hidden_layers=1).save_pretrained(
        tmp_path / "student"
    )
    alone = train(tmp_path, cache.root, 1, 4, gradient_accumulation_steps=2)[0]
    assert_alike(train(tmp_path, cache.root, 2, 4), alone)
    sharded = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    assert_alike(train(tmp_path, cache.root, 2, 4, **sharded), alone)


@pytest.mark.full
@pytest.mark.slow
def test_two_ranks_count_aligned_spans_as_one_that_accumulates(tmp_path, lm_tokenizer, documents):
    """The ranks have unequal numbers of spans with unequal weights, under DDP and FSDP.

    The backward pass reads the output matrix a second time.
    """
    documents["validation"] = documents["test"]
    teacher = tiny_model("llama", len(lm_tokenizer), spread=4.0)
    cache = softlabel.cache_logits(
        teacher, documents, tmp_path / "cache", task="causal-lm", tokenizer=lm_tokenizer, max_length=32
    )
    tiny_model("llama", len(lm_tokenizer), seed=1, spread=2.0, num_hidden_layers=1).save_pretrained(
        tmp_path / "student"
    )
    alone = train(tmp_path, cache.root, 1, 4, span_weight=0.7, gradient_accumulation_steps=2)[0]
    assert len(alone["spans"]) == 12
    sharded = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    for extra in ({}, sharded):
        found = train(tmp_path, cache.root, 2, 4, span_weight=0.7, **extra)
        assert_alike(found, alone)
        assert found[0]["spans"] == pytest.approx(alone["spans"], rel=1e-5)
        assert found[0]["metrics"]["eval_span_loss"] == pytest.approx(alone["metrics"]["eval_span_loss"], rel=1e-4)
