"""An audit detects a cache from another teacher and tolerates numerical noise of batching."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

import pipeline as softlabel
from pipeline.cache import Cache
from pipeline.capture.audit import audit
from pipeline.cli import main
from pipeline.errors import ContractError
from pipeline.models import LoadedModel
from pipeline.records import Full, Sampled, TopK, TopP
from tests.conftest import tiny_model
from tests.support.profile import in_full

ENCODINGS = [Full(), TopK(7), TopP(0.8), Sampled(12.0), Sampled(6.0, 2.0)]


def made(tmp_path, tokenizer, rows, encoding, name="cache", seed=0, model=None):
    model = model or tiny_model("llama", len(tokenizer), spread=4.0, seed=seed)
    cache = softlabel.cache_logits(
        model,
        rows,
        tmp_path / name,
        task="causal-lm",
        tokenizer=tokenizer,
        encoding=encoding,
        max_length=48,
        batch_tokens=300,
    )
    return cache, LoadedModel(model, tokenizer, "teacher")


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_a_cache_agrees_with_its_teacher(tmp_path, lm_tokenizer, documents, encoding):
    cache, teacher = made(tmp_path, lm_tokenizer, documents, encoding)
    found = audit(cache, teacher, rows=30)
    assert found.verdict == "agrees", found.figures
    assert found.rows == 30
    assert found.positions > 300
    assert any(figure.floor > 0 for figure in found.figures)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("scale", [1.03, *in_full(0.97)])
def test_soft_labels_of_nearly_that_teacher_differ(tmp_path, lm_tokenizer, documents, encoding, scale, monkeypatch):
    """The logits are scaled by 3% up or down, while the cache names the original teacher."""
    from pipeline.capture import shard

    whole = shard.label_rows
    monkeypatch.setattr(
        shard, "label_rows", lambda task, rows, logits, *a, **k: whole(task, rows, logits * scale, *a, **k)
    )
    cache, teacher = made(tmp_path, lm_tokenizer, documents, encoding)
    assert audit(cache, teacher, rows=30).verdict == "differs"


def test_a_bias_in_the_tail_alone_is_found(tmp_path, lm_tokenizer, documents, monkeypatch):
    """Top and likelihood are right; each class id of the sampled tail is too high by one."""
    import dataclasses

    from pipeline.capture import shard

    whole = shard.encode_rows

    def moved(*args, **kwargs):
        soft, scores = whole(*args, **kwargs)
        return dataclasses.replace(soft, tail_ids=(soft.tail_ids + 1).clamp_max(319)), scores

    monkeypatch.setattr(shard, "encode_rows", moved)
    cache, teacher = made(tmp_path, lm_tokenizer, documents, Sampled(12.0))
    found = audit(cache, teacher, rows=40)
    assert found.verdict == "differs"
    assert next(figure.what for figure in found.figures if not figure.agrees).startswith("log q")


def test_classifiers(tmp_path, bert_tokenizer, topics):
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3, spread=4.0)
    model.config.id2label = {0: "business", 1: "sport", 2: "film"}
    cache = softlabel.cache_logits(
        model, topics, tmp_path / "c", task="sequence-classification", tokenizer=bert_tokenizer, batch_tokens=100
    )
    assert audit(cache, LoadedModel(model, bert_tokenizer, "t"), rows=500).rows == 120


def test_the_command_keeps_a_report_and_refuses_another_teacher(tmp_path, lm_tokenizer, documents, save_teacher):
    model = tiny_model("llama", len(lm_tokenizer), spread=4.0)
    teacher = save_teacher(model, lm_tokenizer)
    cache = softlabel.cache_logits(str(teacher), documents, tmp_path / "c", task="causal-lm", max_length=48)
    before = (cache.root / "manifest.json").read_bytes()
    arguments = ["audit", "--cache", str(cache.root), "--rows", "8", "--teacher"]
    done = CliRunner().invoke(main, [*arguments, str(teacher)])
    assert done.exit_code == 0, done.output
    assert "verdict: the cache agrees with its teacher" in done.output
    (report,) = (cache.root / "reports").glob("audit-*.json")
    assert json.loads(report.read_text())["verdict"] == "agrees"
    assert (cache.root / "manifest.json").read_bytes() == before
    Cache.open(cache.root, verify="full")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-4
    done = CliRunner().invoke(main, [*arguments, str(save_teacher(model, lm_tokenizer, "other"))])
    assert done.exit_code == 1
    assert "is not the teacher of this cache: weights" in done.output


def test_another_tokenizer_is_refused(tmp_path, lm_tokenizer, bert_tokenizer, documents):
    cache, teacher = made(tmp_path, lm_tokenizer, documents["test"], TopK(3))
    with pytest.raises(ContractError, match="its tokenizer is not the cache's"):
        audit(cache, LoadedModel(teacher.model, bert_tokenizer, "t"))
