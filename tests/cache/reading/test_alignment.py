"""Checks before training that soft labels match their tokens and agree with the hard labels."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import pipeline as softlabel
from pipeline.cache import Cache, Layout, Plan
from pipeline.cache.format.codec import content_hash
from pipeline.cache.format.manifest import parse
from pipeline.cache.format.rows import rows_of
from pipeline.cache.reading import alignment
from pipeline.cache.reading.alignment import check_alignment, spread_blocks
from pipeline.cache.writing import build
from pipeline.cache.writing.build import begin, finish, record
from pipeline.cache.writing.writer import write_shard
from pipeline.errors import ContractError
from pipeline.records import Full, Receipt, Sampled, ShardPlan, TopK
from tests.conftest import tiny_model
from tests.support.rows import build_cache, make_plan, token_row


@pytest.fixture
def misaligned(tmp_path, lm_tokenizer, monkeypatch):
    """A cache whose second shard alone is misaligned, finished without the alignment check."""
    shards = tuple(ShardPlan(f"train-{i:05d}", "train", i * 50, (i + 1) * 50) for i in range(2))
    plan, schema = make_plan(lm_tokenizer, Sampled(6.0), 41, shards, tokens=True, kept={"id": pa.string()})
    layout = begin(tmp_path / "cache", plan, lm_tokenizer)
    for shard, shift in zip(shards, (0, 1), strict=True):
        rows = []
        for n in range(shard.start, shard.stop):
            row = token_row(n, Sampled(6.0), 41, length=60 if shift else 42, known=True)
            example = dataclasses.replace(row.example, input_ids=np.roll(row.example.input_ids, shift))
            rows.append(dataclasses.replace(row, example=example, content_hash=content_hash(example)))
        record(layout, Receipt(write_shard(layout.shard(shard.name), shard, rows, schema), shard, (), "cpu", 0.0, 0.0))
    with monkeypatch.context() as patch:
        patch.setattr(build, "check_alignment", lambda cache, name: None)
        return finish(layout, plan)


def test_a_cache_that_is_out_of_step_is_refused_before_training(tmp_path, misaligned, lm_tokenizer):
    """The check samples rows from every shard: the first shard alone would pass."""
    model = tiny_model("gpt2", len(lm_tokenizer))
    with pytest.raises(ContractError, match="not aligned with their tokens"):
        softlabel.train_student(misaligned, model, tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_and_at_capture(misaligned):
    plan = parse(Plan, Layout(misaligned.root).plan)
    Layout(misaligned.root).manifest.unlink()
    with pytest.raises(ContractError, match="not aligned"):
        finish(Layout(misaligned.root), plan)
    assert not Layout(misaligned.root).manifest.exists()


def spread_rows(cache):
    return [row for block in spread_blocks(cache, cache.splits) for row in rows_of(block)]


@pytest.mark.parametrize("encoding", [Full(), TopK(4), Sampled(6.0)], ids=lambda e: e.kind)
def test_rows_of_a_small_cache_are_all_and_of_a_large_one_spread(tmp_path, lm_tokenizer, encoding, monkeypatch):
    cache = build_cache(tmp_path / "cache", lm_tokenizer, encoding=encoding, per_shard=12, shards=9)
    rows = spread_rows(cache)
    assert [row.example.source_row for row in rows] == list(range(108))
    monkeypatch.setattr(alignment, "_POSITIONS", 60)
    monkeypatch.setattr(alignment, "_ROW_GROUPS", 3)
    rows = spread_rows(cache)
    assert [row.example.source_row for row in rows] == [0, 1, 2, 36, 37, 38, 72, 73, 74]
    whole = list(cache.dataset("train"))
    for row in rows:
        same = whole[row.example.source_row]
        assert np.array_equal(row.example.input_ids, same.example.input_ids)
        assert torch.equal(row.soft.top_ids, same.soft.top_ids)
        assert torch.equal(row.soft.tail_ids, same.soft.tail_ids)


def test_it_reads_a_bounded_number_of_positions(tmp_path, lm_tokenizer, monkeypatch):
    """The cost of the check before training does not grow with the cache.

    The number of positions is bounded, plus at most one row per row group.
    """
    cache = build_cache(tmp_path / "cache", lm_tokenizer, per_shard=40, shards=3)
    whole = sum(shard.positions for shard in cache.manifest.shards)
    longest = max(len(row.example.input_ids) for row in cache.dataset("train"))
    bound = whole // 4
    monkeypatch.setattr(alignment, "_POSITIONS", bound)
    rows = spread_rows(cache)
    assert 0 < sum(int(row.example.supervised.sum()) for row in rows) <= bound + longest * len(cache.manifest.shards)
    monkeypatch.undo()
    assert check_alignment(cache) == cache.manifest.probe


def classes_cache(tmp_path, tokenizer, topics, name, believed):
    """A cache whose teacher favours class `believed(label)` for a row with that label."""
    labels = {"business": 0, "sport": 1, "film": 2}

    def row(text, label):
        logits = torch.zeros(1, 3)
        if label is not None:
            logits[0, believed(labels[label])] = 5.0
        return softlabel.LabelledRow(
            tokenizer(text)["input_ids"], logits=logits, label=labels.get(label), text=text, split="train"
        )

    rows = [row(text, label) for text, label in zip(topics["train"]["text"], topics["train"]["label"], strict=True)]
    return softlabel.write_cache(
        rows,
        tmp_path / name,
        task="sequence-classification",
        tokenizer=tokenizer,
        encoding=Full(),
        teacher="t",
        label_names=tuple(labels),
    )


@pytest.mark.parametrize(
    ("name", "believed", "warned"), [("good", lambda i: i, False), ("turned", lambda i: (i + 1) % 3, True)]
)
def test_agreement_that_is_not_above_chance_is_a_warning(
    tmp_path, bert_tokenizer, topics, caplog, name, believed, warned
):
    with caplog.at_level(logging.WARNING, "pipeline"):
        cache = classes_cache(tmp_path, bert_tokenizer, topics, name, believed)
        assert ("no more than by chance" in caplog.text) == warned
        caplog.clear()
        student = tiny_model("bert", len(bert_tokenizer), num_labels=3)
        args = softlabel.train_student.__globals__["training_arguments"](str(tmp_path / "s"), {}, max_steps=1)
        softlabel.train_student(Cache.open(cache.root), student, tmp_path / "s", args=args)
    assert ("is the hard label in 0.0% of 72 rows" in caplog.text) == warned
    assert isinstance(AutoModelForSequenceClassification.from_pretrained(tmp_path / "s"), torch.nn.Module)
