"""Masked language modelling end to end: texts, teacher, cache, student, evaluation."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForMaskedLM

import pipeline as softlabel
from pipeline.cache import Cache, verify
from pipeline.cache.transforms.merge import merge
from pipeline.cache.views.inspection import describe
from pipeline.cache.views.page import write_page
from pipeline.capture.audit import run as audit
from pipeline.capture.estimate.run import run as estimate
from pipeline.config import AuditConfig, DataConfig, EstimateConfig, PredictConfig, ReportConfig, TrainTeacherConfig
from pipeline.errors import ContractError, MisuseError, ModelError, SourceError
from pipeline.evaluation import evaluate
from pipeline.evaluation.report.report import report
from pipeline.evaluation.run import groups_of, predictions_of_teacher
from pipeline.models.detect import detect_task
from pipeline.models.predict import run as predict
from pipeline.records import Full, Masking, Sampled
from pipeline.tasks import get_task
from pipeline.training.batches.held_out import hold_out
from pipeline.training.teacher import run as train_teacher
from tests.conftest import TOPICS
from tests.support.once import once
from tests.support.teaching import pretrained, train, write

TASK = "masked-lm"
SMALL = {"num_hidden_layers": 1, "initializer_range": 0.1}


def sentences(seed: int, count: int) -> list[str]:
    """Return sentences with words of one topic each, so that a masked word has few candidates."""
    rng = random.Random(seed)
    return [
        " ".join(rng.choice(TOPICS[topic]) for _ in range(rng.randint(5, 9)))
        for topic in rng.choices(list(TOPICS), k=count)
    ]


def texts() -> DatasetDict:
    return DatasetDict(
        {
            name: Dataset.from_dict({"text": sentences(seed, count)})
            for seed, (name, count) in enumerate({"train": 300, "test": 60}.items())
        }
    )


@pytest.fixture
def teacher(tmp_path, bert_tokenizer) -> Path:
    def make(folder: Path) -> None:
        base = pretrained(folder / "base", bert_tokenizer, **SMALL)
        data = DataConfig(dataset=str(write(folder / "data", texts())), mask_share=0.3)
        metrics = train_teacher(
            TrainTeacherConfig(
                task=TASK,
                data=data,
                model=str(base),
                output=str(folder / "teacher"),
                epochs=25,
                batch_size=16,
                learning_rate=4e-3,
            )
        )
        assert metrics["loss"] < 1.6

    once((__name__, "teacher"), make, tmp_path)
    return tmp_path / "teacher"


@pytest.fixture
def cache(tmp_path, teacher) -> Cache:
    def make(folder: Path) -> None:
        softlabel.cache_logits(
            str(teacher), texts(), folder / "cache", task=TASK, rows_per_shard=70, batch_tokens=256, masking=Masking(share=0.3, copies=2),
            encoding=Sampled(4.0),
        )  # fmt: skip

    once((__name__, "cache"), make, tmp_path)
    return Cache.open(tmp_path / "cache")


def test_cached_values_are_the_models(tmp_path, teacher):
    """A cache with every class stores the model's logits at each masked token.

    The reference is the model's output for the masked input.
    """
    softlabel.cache_logits(str(teacher), texts(), tmp_path / "full", task=TASK, encoding=Full(), batch_tokens=256)
    cache = Cache.open(tmp_path / "full")
    model = AutoModelForMaskedLM.from_pretrained(teacher).eval()
    assert detect_task(str(teacher)).name == TASK
    assert cache.manifest.contract.tokenization.masking == Masking()
    assert not verify(cache.root).problems
    tokenizer, source = cache.tokenizer, texts()["test"]
    for row in cache.dataset("test"):
        example = row.example
        assert example.supervised is not None
        assert example.labels is not None
        whole = example.input_ids.copy()
        whole[example.supervised] = example.labels
        assert tokenizer.decode(whole, skip_special_tokens=True) == source[example.source_row]["text"]
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(example.input_ids.astype(np.int64))[None]).logits[0]
        expected = torch.log_softmax(logits[torch.from_numpy(example.supervised)], -1)
        torch.testing.assert_close(row.soft.top_logprobs.view_as(expected), expected, atol=1e-4, rtol=1e-4)


def test_a_capture_is_the_same_whoever_makes_its_shards(tmp_path, cache, teacher):
    other = softlabel.cache_logits(
        str(teacher), texts(), tmp_path / "other", task=TASK, rows_per_shard=33, batch_tokens=256, masking=Masking(share=0.3, copies=2), encoding=Sampled(4.0)
    )  # fmt: skip
    for ours, theirs in zip(cache.dataset("train"), other.dataset("train"), strict=True):
        assert ours.content_hash == theirs.content_hash
        assert ours.example.input_ids.tolist() == theirs.example.input_ids.tolist()


@pytest.mark.full
def test_a_student_comes_close_to_its_teacher_and_a_control_beside_it(tmp_path, cache, bert_tokenizer):
    start = pretrained(tmp_path / "start", bert_tokenizer, seed=1, **SMALL)
    long = {"max_steps": 200, "learning_rate": 4e-3}
    train(cache, start, tmp_path / "untrained", max_steps=1, learning_rate=1e-9)
    train(cache, start, tmp_path / "student", **long)
    train(cache, start, tmp_path / "control", **long, hard_weight=1.0, soft_weight=0.0)
    found = evaluate(cache, {name: tmp_path / name for name in ("untrained", "student", "control")})
    before, student, control = found.students
    assert found.main_metric == "loss"
    assert student.metrics["loss"] < 0.8 * before.metrics["loss"]
    assert student.metrics["loss"] < 1.15 * found.teacher.metrics["loss"]
    assert control.metrics["loss"] < before.metrics["loss"]
    assert student.kl is not None
    assert before.kl is not None
    assert student.kl < 0.3 * before.kl


def test_the_masks_of_a_text_are_held_out_together(tmp_path, cache, teacher):
    dataset = cache.dataset("train")
    found = hold_out(dataset, None, by="position_labels")
    assert found is not None
    rows = dataset.column("source_row")
    assert not set(rows[found.measured]) & set(rows[found.left])
    assert rows[found.measured].max() > 200  # spread over the whole split
    few = sentences(3, 250)  # each text in two rows with different masks
    twice = softlabel.cache_logits(
        str(teacher), DatasetDict(train=Dataset.from_dict({"text": few + few})), tmp_path / "twice", task=TASK
    ).dataset("train")
    found = hold_out(twice, None, by="position_labels")
    assert found is not None
    rows = twice.column("source_row") % 250
    assert not {few[i] for i in rows[found.measured]} & {few[i] for i in rows[found.left]}


def test_intervals_resample_texts_not_masks(tmp_path, teacher, bert_tokenizer):
    test = DatasetDict(test=Dataset.from_dict({"text": sentences(4, 60)}))
    widths = {}
    for copies in (1, 16):
        made = softlabel.cache_logits(
            str(teacher), test, tmp_path / f"{copies}", task=TASK, masking=Masking(copies=copies, share=0.5)
        )
        blocks = made.dataset("test").blocks()
        predictions = predictions_of_teacher(get_task(TASK), blocks, 1.0, None, groups_of(made, "test"))
        assert predictions.groups is not None
        assert predictions.groups.max() == 59
        scores, weights = get_task(TASK).row_scores(predictions)
        assert len(scores) == len(weights) == 60
        assert scores.sum() / weights.sum() == pytest.approx(predictions.nll.mean())
        widths[copies] = len(predictions.row_text_bytes)
    assert widths[16] == 16 * widths[1]


@pytest.mark.full
def test_pages_show_the_hidden_tokens(tmp_path, cache, teacher, bert_tokenizer):
    lines = "\n".join(describe(cache, split="test", rows=1, tokens=5, top=3))
    assert "30% of the tokens hidden, 2 masks of each text" in lines
    assert "hidden token" in lines
    row = next(iter(cache.dataset("test")))
    assert row.example.labels is not None
    assert repr(bert_tokenizer.decode([int(row.example.labels[0])])) in lines
    write_page(cache, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "is the hidden token of the data at" in page
    card = (cache.root / "README.md").read_text()
    assert "`supervised` marks the positions of `input_ids` whose tokens were hidden" in card
    assert "--mask-share 0.3 --mask-copies 2" in card
    start = pretrained(tmp_path / "start", bert_tokenizer, **SMALL)
    train(cache, start, tmp_path / "a", max_steps=20)
    train(cache, start, tmp_path / "b", max_steps=5)
    found = report(
        ReportConfig(
            cache=(str(cache.root),), student=(f"a={tmp_path / 'a'}",), control=(f"b={tmp_path / 'b'}",), output=str(tmp_path / "report"),
            rounds=0, resamples=200,
        )
    )  # fmt: skip
    assert found.slice_kind.startswith("hidden token, by how often")
    assert "fill-mask" in (tmp_path / "a" / "README.md").read_text()
    page = (tmp_path / "report" / "report.html").read_text()
    assert "rows that are resampled are all masks of a text" in page
    assert "Intervals resample texts" in page


def test_what_is_refused(tmp_path, cache, teacher, lm_tokenizer, bert_tokenizer):
    other = pretrained(tmp_path / "other", lm_tokenizer, **SMALL)
    with pytest.raises(ContractError, match="the student has another tokenizer, and hidden tokens are the teacher's"):
        train(cache, other, tmp_path / "a", max_steps=1)
    with pytest.raises(MisuseError, match="has no mask token"):
        softlabel.cache_logits(str(other), texts(), tmp_path / "b", task=TASK)
    start = pretrained(tmp_path / "start", bert_tokenizer, **SMALL)
    with pytest.raises(MisuseError, match="--lora-r: PEFT has no name for --task masked-lm"):
        train(cache, start, tmp_path / "c", lora_r=2)
    model = AutoModelForMaskedLM.from_pretrained(start)
    model.bert.save_pretrained(tmp_path / "headless")
    bert_tokenizer.save_pretrained(tmp_path / "headless")
    with pytest.raises(ModelError, match="the checkpoint lacks 6 weights that BertForMaskedLM needs"):
        softlabel.cache_logits(str(tmp_path / "headless"), texts(), tmp_path / "d", task=TASK)
    for values, message in (
        ({"mask_share": 1.0}, "--mask-share: expected a share"),
        ({"mask_copies": 0}, "--mask-copies"),
    ):
        with pytest.raises(MisuseError, match=message):
            DataConfig(dataset="x", **values)
    with pytest.raises(SourceError, match=r"text 1: expected a \[MASK\] to fill"):
        list(predict(PredictConfig(model=str(teacher), text=("no mask here",))))


def test_masks_are_filled(teacher):
    (film,) = TOPICS["film"][:1]
    one, several = predict(
        PredictConfig(model=str(teacher), text=(f"{film} [MASK] {film}", f"[MASK] {film} [MASK]"), top=3)
    )
    assert len(one.labels) == 3
    assert next(iter(one.labels)) in TOPICS["film"]
    assert [each.word for each in several.words] == ["[MASK]"] * 2


def test_estimate_audit_and_merge(tmp_path, cache, teacher, caplog):
    write(tmp_path / "rows", texts())
    data = DataConfig(dataset=str(tmp_path / "rows"), mask_copies=2)
    found = estimate(EstimateConfig(task=TASK, data=data, teacher=str(teacher)))
    assert any(isinstance(line.encoding, Sampled) for line in found.encodings)
    assert audit(AuditConfig(cache=str(cache.root), teacher=str(teacher), rows=16)).verdict == "agrees"
    with caplog.at_level(logging.INFO):
        joined = merge([cache, cache], tmp_path / "joined")
    assert len(joined.dataset("test")) <= len(cache.dataset("test"))
    assert not verify(joined.root).problems


def test_rows_of_ones_own(tmp_path, bert_tokenizer):
    from pipeline.capture.labelled import LabelledRow
    from pipeline.capture.write import write_cache

    row: Any = LabelledRow(
        [2, 4, 6, 3], supervised=[False, True, False, False], labels=[9], logits=torch.randn(1, len(bert_tokenizer))
    )
    made = write_cache(
        [row], tmp_path / "a", task=TASK, tokenizer=bert_tokenizer, encoding=Sampled(4.0), teacher="mine"
    )
    (found,) = made.dataset("train")
    assert found.example.labels.tolist() == [9]
    assert not verify(made.root).problems
