"""Two processes over gloo: the same losses as one, and ranks that stay equal to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pipeline as softlabel
from tests.conftest import tiny_model
from tests.support import processes
from tests.support.processes import python

SCRIPT = """
import hashlib, json, os, sys, torch
torch.set_num_threads(1)
import pipeline as softlabel
from pipeline.models.arguments import training_arguments
from pipeline.tasks import get_task
cache, student, output, batch, extra = sys.argv[1:]
cache = softlabel.Cache.open(cache)
settings = {"max_steps": 12, "per_device_train_batch_size": int(batch), "learning_rate": 1e-3, "save_strategy": "no", "use_cpu": True}
args = training_arguments(output, {"logging_steps": 1, **settings, **json.loads(extra)})
model = get_task(cache.manifest.contract.task).auto_class.from_pretrained(student)
trainer = softlabel.DistillationTrainer(model, args, cache=cache, loss=softlabel.Loss(0.5, 0.5))
digests = []
class Watch(__import__("transformers").TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        if not trainer.is_fsdp_enabled:  # whose ranks hold different parts
            digests.append(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())
trainer.add_callback(Watch())
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
found = {"world_size": args.world_size, "digests": digests, "losses": losses, "metrics": trainer.evaluate()}
with open(f"{output}-{args.process_index}.json", "w") as file:
    json.dump(found, file)
"""


def train(tmp_path: Path, cache: Path, ranks: int, batch: int, **extra) -> list[dict]:
    """What each rank says of its run. torchrun itself is in test_trainer."""
    output = tmp_path / f"out-{ranks}-{len(extra)}"
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    arguments = [str(cache), str(tmp_path / "student"), str(output), str(batch), json.dumps(extra)]
    for done in processes.ranks(ranks, str(script), *arguments) if ranks > 1 else [python(str(script), *arguments)]:
        assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(f"{output}-{rank}.json").read_text()) for rank in range(ranks)]


def assert_alike(found: list[dict], expected: dict) -> None:
    assert [rank["world_size"] for rank in found] == [len(found)] * len(found)
    assert all(rank["digests"] == found[0]["digests"] for rank in found)  # equal to the last bit after every step
    assert found[0]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for name in ("eval_loss", "eval_accuracy", "eval_agreement", "eval_divergence"):
        assert found[0]["metrics"][name] == pytest.approx(expected["metrics"][name], rel=1e-4)


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path, bert_tokenizer, topics):
    """Global batches of 8 over 90 rows, every fifth without a label: the ranks hold unequal counts, and the last step a filler."""
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


@pytest.mark.slow
def test_two_ranks_of_a_language_model_train_as_one_that_accumulates(tmp_path, lm_tokenizer, documents):
    """The fused loss under DDP and FSDP; rows of 3 to 60 words, so that the ranks hold unequal numbers of positions."""
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
