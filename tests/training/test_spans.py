"""A loss over aligned spans in a training run.

It does not depend on how rows are batched, it is logged and recorded, and without a weight nothing
changes.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import pipeline as softlabel
from pipeline.cache import Cache
from pipeline.cache.format.manifest import dump, parse
from pipeline.errors import ContractError, MisuseError, TrainingError
from pipeline.models.arguments import training_arguments
from pipeline.records import Loss, Sampled
from pipeline.tasks import get_task
from pipeline.training import trainer as trainer_module
from pipeline.training.batches.collate import Collator, TrainingRows, from_tensors, to_tensors
from pipeline.training.batches.mixing import make_mixture
from pipeline.training.run import Origin
from pipeline.training.spans import span_sums
from tests.conftest import tiny_model
from tests.support.rows import build_cache
from tests.support.spans import SpanCollator, pairs, with_spans

LOSS = Loss(0.4, 0.3, span_weight=0.5, span_temperature=10.0)


@pytest.fixture
def cache(tmp_path, lm_tokenizer) -> Cache:
    return build_cache(
        tmp_path / "cache",
        lm_tokenizer,
        encoding=Sampled(6.0),
        classes=320,
        per_shard=12,
        splits=("train", "validation"),
    )


def model_of(cache: Cache):
    return tiny_model("llama", len(cache.tokenizer), spread=3.0, num_hidden_layers=1)


def trainer_of(cache: Cache, tmp_path: Path, loss: Loss = LOSS, *, spans: bool = True, **training):
    settings = {"save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2, "max_steps": 3, **training}
    args = training_arguments(str(tmp_path / "o"), {}, **{"per_device_train_batch_size": 8, **settings})
    made = softlabel.DistillationTrainer(model_of(cache), args, cache=cache, loss=loss)
    return with_spans(made) if spans else made


def logs(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_batches_keep_their_spans(cache):
    picked = TrainingRows(cache.dataset("train")).__getitems__([0, 3, ~4])
    collator = SpanCollator(get_task("causal-lm"), cache.tokenizer, 1.0)
    batch = collator.collate(picked)
    tensors = to_tensors(batch)
    found = from_tensors(tensors, 320).spans
    for name in ("owner", "teacher_logprobs", "weights"):
        assert torch.equal(getattr(found, name), getattr(batch.spans, name))
    assert found.weights.min() == 0 < found.weights.max()  # the last row does not count
    plain = Collator(get_task("causal-lm"), cache.tokenizer, 1.0)(picked)
    assert set(tensors) - set(plain) == {"spans"}
    assert from_tensors(plain, 320).spans is None


@pytest.mark.parametrize("loss", [LOSS, Loss(0.0, 0.0, span_weight=1.0), Loss(1.0, 0.0, span_weight=2.0)])
def test_accumulated_batches_are_one_large_batch(tmp_path, cache, loss):
    """Batches have unequal span counts and weights, so that a mean of means would differ."""
    whole = trainer_of(cache, tmp_path, loss)
    counts = {float(b["spans"]["weights"].sum()) for b in whole._loader(whole.train_dataset, 2, shuffle=True)}
    assert len(counts) > 3
    whole.train()
    parts = trainer_of(cache, tmp_path, loss, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    parts.train()
    for name in ("loss", "span_loss", "grad_norm"):
        found, expected = ([entry[name] for entry in logs(each)] for each in (parts, whole))
        assert found == pytest.approx(expected, rel=1e-4), name
    for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_each_term_is_logged_and_their_weighted_sum_is_the_loss(tmp_path, cache):
    trainer = trainer_of(cache, tmp_path)
    trainer.train()
    for entry in logs(trainer):
        expected = 0.4 * entry["hard_loss"] + 0.3 * entry["soft_loss"] + 0.5 * entry["span_loss"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-3)
        assert entry["span_loss"] > 0


def test_the_first_span_loss_is_that_of_the_models_own_logits(tmp_path, cache):
    trainer = trainer_of(cache, tmp_path, max_steps=1)
    batch = from_tensors(next(iter(trainer.get_train_dataloader())), 320)
    with torch.no_grad():
        logits = get_task("causal-lm").gather_logits(model_of(cache), batch.inputs, batch.supervised)
    nll = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
    total, count = span_sums(nll, batch.spans, temperature=10.0)
    trainer.train()
    assert logs(trainer)[0]["span_loss"] == pytest.approx(float(total / count), rel=1e-4)


def test_spans_are_learnt(tmp_path, cache):
    """The loss is over spans alone; its minimum is 0."""
    trainer = trainer_of(cache, tmp_path, Loss(0.0, 0.0, span_weight=1.0), max_steps=40)
    trainer.train()
    losses = [entry["span_loss"] for entry in logs(trainer)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_an_evaluation_counts_spans_and_weighs_them(tmp_path, cache):
    trainer = trainer_of(cache, tmp_path)
    found = trainer.evaluate()
    expected = 0.4 * found["eval_nll"] + 0.3 * found["eval_divergence"] + 0.5 * found["eval_span_loss"]
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-4)
    one_by_one = trainer_of(cache, tmp_path, per_device_eval_batch_size=1)
    assert one_by_one.evaluate()["eval_span_loss"] == pytest.approx(found["eval_span_loss"], rel=1e-5)


def test_without_a_weight_spans_change_nothing(tmp_path, cache):
    """Runs with and without spans in their batches are bitwise equal, and log no span loss."""
    runs = [trainer_of(cache, tmp_path, Loss(0.4, 0.3), spans=spans) for spans in (False, True)]
    for trainer in runs:
        trainer.train()
    plain, beside = ([{k: v for k, v in e.items() if k in ("loss", "grad_norm")} for e in logs(t)] for t in runs)
    assert plain == beside
    assert not any("span_loss" in entry for trainer in runs for entry in logs(trainer))
    assert all(torch.equal(a, b) for a, b in zip(*(trainer.model.parameters() for trainer in runs), strict=True))
    assert "eval_span_loss" not in runs[0].evaluate()


def test_a_weight_without_spans_is_refused_at_the_first_step(tmp_path, cache):
    with pytest.raises(TrainingError, match=r"step 1, source rows .*--span-weight 0.5: expected aligned spans"):
        trainer_of(cache, tmp_path, spans=False).train()


def test_labels_that_are_not_the_texts_and_several_teachers_are_refused(tmp_path, cache):
    args = training_arguments(str(tmp_path / "o"), {}, max_steps=1)
    settings = {"cache": cache, "loss": LOSS}
    with pytest.raises(MisuseError, match="--hard-labels teacher replaces them"):
        softlabel.DistillationTrainer(model_of(cache), args, teacher_labels=True, **settings)
    mixture = make_mixture([cache, cache], "teachers", (0.5, 0.5))
    with pytest.raises(MisuseError, match="found several teachers"):
        softlabel.DistillationTrainer(model_of(cache), args, mixture=mixture, **settings)
    softlabel.DistillationTrainer(
        model_of(cache), args, cache=cache, loss=LOSS, mixture=make_mixture([cache, cache], "data", (0.5, 0.5))
    )


def train(cache: Cache, output: Path, loss: Loss, **training):
    args = training_arguments(str(output), {}, **{"max_steps": 2, "save_steps": 1, "logging_steps": 1, **training})
    return softlabel.train_student(cache, model_of(cache), output, loss=loss, args=args)


def test_what_is_kept_of_a_run_without_spans_is_what_it_was(tmp_path, cache):
    train(cache, tmp_path / "out", Loss(0.4, 0.3))
    for name in ("origin.json", "distillation.json", "README.md"):
        assert "span" not in (tmp_path / "out" / name).read_text(), name


def test_what_is_kept_of_a_run_with_spans(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(trainer_module, "Collator", SpanCollator)
    result = train(cache, tmp_path / "out", Loss(0.4, 0.3, span_weight=0.5))
    kept = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert (kept["loss"]["span_weight"], kept["loss"]["span_temperature"]) == (0.5, 100.0)
    assert kept["span_loss"] == result.span_loss > 0
    assert (
        "0.5 * binary KL from the teacher over aligned spans at tau = 100"
        in (tmp_path / "out" / "README.md").read_text()
    )


def test_an_origin_of_before_is_that_of_a_run_without_spans(tmp_path):
    origin = Origin("id", Loss(0.4, 0.3), "train", False, 0, 1e-3, 8, None, "sha", None)
    content = json.loads(dump(origin))
    assert not [name for name in content["loss"] if "span" in name]
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert parse(Origin, tmp_path / "old.json") == origin
    with_weight = dataclasses.replace(origin, loss=LOSS)
    (tmp_path / "new.json").write_text(dump(with_weight))
    assert parse(Origin, tmp_path / "new.json") == with_weight


def test_a_run_goes_on_with_the_same_span_weight_only(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(trainer_module, "Collator", SpanCollator)
    loss = Loss(0.4, 0.3, span_weight=0.5)
    whole = train(cache, tmp_path / "whole", loss)
    train(cache, tmp_path / "out", loss)
    for name in ("distillation.json", "checkpoint-2/trainer_state.json"):
        (tmp_path / "out" / name).unlink()
    with pytest.raises(ContractError, match=r"loss.span_weight: expected 0.5, found null"):
        train(cache, tmp_path / "out", Loss(0.4, 0.3))
    again = train(cache, tmp_path / "out", loss)
    assert again.steps == 2
    assert again.span_loss == pytest.approx(whole.span_loss, rel=1e-6)


def test_pairs_of_the_helper_are_pairs(cache):
    picked = TrainingRows(cache.dataset("train")).__getitems__([0, 1, 2])
    spans = pairs(Collator(get_task("causal-lm"), cache.tokenizer, 1.0).collate(picked))
    assert set(torch.bincount(spans.owner[spans.owner >= 0]).tolist()) == {2}
