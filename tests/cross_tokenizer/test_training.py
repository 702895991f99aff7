"""Students with another tokenizer than the teacher, from capture to evaluation."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pipeline.cache import Cache
from pipeline.capture.run import run as capture
from pipeline.config import TrainStudentConfig
from pipeline.cross_tokenizer.kept import Maker
from pipeline.cross_tokenizer.opening import cache_for, open_retokenized
from pipeline.errors import ContractError, MisuseError
from pipeline.evaluation import evaluate
from pipeline.evaluation.table import format_table
from pipeline.records import Loss
from pipeline.tasks import get_task
from pipeline.training.batches.collate import Collator
from pipeline.training.losses import distillation_loss
from pipeline.training.run import run as train
from tests.conftest import WORDS, tiny_model
from tests.support.captures import config
from tests.support.once import once
from tests.tasks.families import FAMILIES

__all__ = ["config"]


def byte_level(size: int, *, eos: str = "<end>") -> PreTrainedTokenizerFast:
    """A byte-level BPE of the given size with special tokens of different ids and names."""
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
def cached(config, tmp_path):
    once("tests.cross_tokenizer", lambda folder: capture(config(str(folder))), tmp_path / "cache")
    return Cache.open(tmp_path / "cache")


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


def test_the_same_tokenizer_through_the_map_is_the_ordinary_path(tmp_path, cached):
    tokenizer = cached.tokenizer
    model = tiny_model("llama", len(tokenizer), seed=5)
    view = open_retokenized(cached, "same", tokenizer, model.config, "train")
    task = get_task("causal-lm")
    plain = Collator(task, tokenizer, 1.0, pad_id=0, for_evaluation=True)
    through = dataclasses.replace(plain, vocabulary_map=view.vocabulary_map)
    pairs = zip(cached.dataset("train").blocks(8), view.dataset("train").blocks(8), strict=True)
    for ours, theirs in pairs:
        one, other = plain.collate_block(ours), through.collate_block(theirs)
        assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.soft_weights, other.soft_weights)
        assert torch.equal(one.teacher_predicted, other.teacher_predicted)
        assert torch.equal(one.text_bytes, other.text_bytes)
        logits = task.gather_logits(model, one.inputs, one.supervised)
        losses = [
            distillation_loss(logits, b.target, labels=b.labels, loss=Loss(), soft_weights=b.soft_weights)
            for b in (one, other)
        ]
        assert losses[0].total.item() == pytest.approx(losses[1].total.item(), rel=1e-5)


def test_evaluate_compares_tokenizers_by_the_byte(tmp_path, cached):
    other = student(tmp_path, byte_level(290))
    same = tmp_path / "same"
    tiny_model("llama", len(cached.tokenizer), seed=4).save_pretrained(same)
    cached.tokenizer.save_pretrained(same)
    report = evaluate(cached, {"other": str(other), "same": str(same)}, split="test")
    assert report.main_metric == "bits_per_byte"
    found = {line.name: line for line in report.students}
    assert set(found["other"].metrics) == {"bits_per_byte", "ece"}
    for line in found.values():
        ratio = report.teacher.metrics["bits_per_byte"] / line.metrics["bits_per_byte"]
        assert line.retention == pytest.approx(ratio)
        assert line.retention_interval.low <= ratio * 1.05
        assert line.retention_interval.high >= ratio * 0.95
    assert "bits_per_byte kept of the teacher's" in format_table(report)
    # Computed directly: the NLL of all predicted tokens of the split, divided by their bytes.
    model = AutoModelForCausalLM.from_pretrained(other).eval()
    tokenizer = AutoTokenizer.from_pretrained(other)
    nats = num_bytes = 0.0
    for row in cached.dataset("test"):
        text = cached.tokenizer.decode(row.example.input_ids)
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logp = torch.log_softmax(model(ids).logits[0, :-1], -1)
        teacher_first = len(cached.tokenizer.decode(row.example.input_ids[:1]).encode())
        starts = np.cumsum([0, *(len(tokenizer.decode([i]).encode()) for i in ids[0].tolist())])
        for j in range(1, ids.shape[1]):
            if starts[j] >= teacher_first:
                nats -= float(logp[j - 1, ids[0, j]])
                num_bytes += starts[j + 1] - starts[j]
    assert found["other"].metrics["bits_per_byte"] == pytest.approx(nats / num_bytes / np.log(2), rel=1e-4)


def test_alignment_is_made_once_and_again_for_another_tokenizer(tmp_path, cached, monkeypatch):
    path = student(tmp_path, byte_level(290))
    made = []
    write = Maker._write

    def counted(self, kept, shard, path):
        made.append(shard.name)
        write(self, kept, shard, path)

    monkeypatch.setattr(Maker, "_write", counted)
    for _ in range(2):
        cache_for(cached, str(path), "train")
    assert made == [shard.name for shard in cached.manifest.split_shards("train")]
    cache_for(cached, str(student(tmp_path, byte_level(300), "other")), "train")
    assert len(made) == 2 * len(cached.manifest.split_shards("train"))


def test_rows_longer_than_the_student_takes_are_cut_and_counted(tmp_path, cached, caplog):
    path = student(tmp_path, byte_level(290), max_position_embeddings=40)
    view = cache_for(cached, str(path), "train")
    assert view.dataset("train").num_tokens().max() == 40
    assert "rows have at most 40 tokens" in caplog.text
    kept = sum(len(b.lists["teacher_position"].values) for b in view.dataset("train").blocks())
    whole = cache_for(cached, str(student(tmp_path, byte_level(290), "long")), "train")
    assert (
        f"{sum(len(b.lists['teacher_position'].values) for b in whole.dataset('train').blocks()) - kept} of"
        in caplog.text
    )


def test_tokenizers_that_hardly_meet_are_refused(tmp_path, cached, monkeypatch, caplog):
    """The student's tokens are single bytes, so most positions begin inside a teacher token."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet))
    path = student(tmp_path, PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>"))
    cache_for(cached, str(path), "train")
    assert "fewer than half of its positions begin where a token of the teacher does" in caplog.text
    monkeypatch.setattr("pipeline.cross_tokenizer.opening._TOO_FEW", 0.5)
    with pytest.raises(ContractError, match=r"expected at least 50% of its positions to be aligned.*found \d\d\.\d%"):
        cache_for(cached, str(path), "train")


@pytest.mark.parametrize("align", ["spans", "both"])
def test_spans_are_learnt_from_stored_log_probabilities(tmp_path, config, align):
    cached = capture(config("cache", store_label_logprobs=True))
    path = student(tmp_path, byte_level(290))
    found = train(train_config(tmp_path, path, align=align))
    assert found.span_loss is not None
    assert (found.soft_loss is None) == (align == "spans")
    view = cache_for(cached, str(path), "train")
    collator = Collator(
        get_task("causal-lm"), view.tokenizer, 1.0, pad_id=0, vocabulary_map=view.vocabulary_map, with_spans=True
    )
    rows = list(cached.dataset("train").blocks(8))
    for original, block in zip(rows, view.dataset("train").blocks(8), strict=True):
        spans = collator.collate_block(block).spans
        total = sum(float(part) for part in spans.teacher_logprobs)
        everything = -float(original.numbers["teacher_nll_sum"].sum())
        assert everything * 1.002 <= total <= 0, "spans are of tokens that both predict"
        assert total == pytest.approx(everything, rel=0.1)


def test_spans_of_the_same_tokenizer_are_its_tokens(tmp_path, config):
    cached = capture(config("cache", store_label_logprobs=True))
    model = tiny_model("llama", len(cached.tokenizer))
    view = open_retokenized(cached, "same", cached.tokenizer, model.config, "train")
    collator = Collator(
        get_task("causal-lm"), view.tokenizer, 1.0, pad_id=0, vocabulary_map=view.vocabulary_map, with_spans=True
    )
    pairs = zip(cached.dataset("train").blocks(8), view.dataset("train").blocks(8), strict=True)
    for original, block in pairs:
        spans = collator.collate_block(block).spans
        stored = original.lists["label_logprobs"].values.astype(np.float32)
        assert spans.owner.tolist() == list(range(len(stored)))
        np.testing.assert_allclose(spans.teacher_logprobs.numpy(), stored, rtol=1e-4, atol=1e-4)


def test_spans_without_what_they_need_are_refused(tmp_path, cached, save_teacher):
    path = student(tmp_path, byte_level(290))
    with pytest.raises(MisuseError, match=r"--align spans: needs.*cache again with --store-label-logprobs"):
        train(train_config(tmp_path, path, align="spans"))
    same = save_teacher(tiny_model("llama", len(cached.tokenizer)), cached.tokenizer, "same")
    with pytest.raises(MisuseError, match=r"--align both: is for students with another tokenizer.*leave it out"):
        train(train_config(tmp_path, same, align="both"))
