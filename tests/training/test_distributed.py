"""Two processes over gloo: the same losses as one, and ranks that stay equal to the last bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline as softlabel
from tests.conftest import tiny_model

SCRIPT = """
import hashlib, json, os, sys, torch
torch.set_num_threads(1)
import pipeline as softlabel
from pipeline.models.arguments import training_arguments
from transformers import AutoModelForSequenceClassification
cache, student, output, batch = sys.argv[1:]
args = training_arguments(output, {"logging_steps": 1}, max_steps=12, per_device_train_batch_size=int(batch), learning_rate=1e-3, save_strategy="no", use_cpu=True)
model = AutoModelForSequenceClassification.from_pretrained(student)
trainer = softlabel.DistillationTrainer(model, args, cache=softlabel.Cache.open(cache), loss=softlabel.Loss(0.5, 0.5, temperature=2.0))
trainer.train()
digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
with open(f"{output}-{args.process_index}.json", "w") as file:
    json.dump({"world_size": args.world_size, "digest": digest, "losses": losses}, file)
"""


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path, bert_tokenizer, topics):
    """Global batches of 8 over 90 rows, every fifth without a label: the ranks hold unequal counts, and the last step a filler."""
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3, spread=4.0)
    model.config.id2label = {0: "business", 1: "sport", 2: "film"}
    cache = softlabel.cache_logits(
        model, topics, tmp_path / "cache", task="sequence-classification", tokenizer=bert_tokenizer
    )
    student = tiny_model(
        "bert", len(bert_tokenizer), num_labels=3, seed=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    student.save_pretrained(tmp_path / "student")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def train(ranks: int, batch: int) -> list[dict]:
        output = tmp_path / f"out{ranks}"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        command = [
            sys.executable,
            *launcher,
            str(script),
            str(cache.root),
            str(tmp_path / "student"),
            str(output),
            str(batch),
        ]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(Path(f"{output}-{rank}.json").read_text()) for rank in range(ranks)]

    one = train(1, 8)[0]
    two = train(2, 4)
    assert [rank["world_size"] for rank in two] == [2, 2]
    assert two[0]["digest"] == two[1]["digest"]
    assert two[0]["losses"] == pytest.approx(one["losses"], rel=1e-5)
