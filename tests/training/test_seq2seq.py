"""Encoder-decoders end to end.

Covers pairs of texts, teacher, cache, a student with the fused loss, and generated texts.
"""

from __future__ import annotations

import logging
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoConfig, AutoModelForSeq2SeqLM, set_seed

import pipeline as softlabel
from pipeline.cache import Cache, verify
from pipeline.cache.transforms.merge import merge
from pipeline.cache.views.inspection import describe
from pipeline.cache.views.page import write_page
from pipeline.capture.audit import run as audit
from pipeline.capture.estimate.run import run as estimate
from pipeline.capture.labelled import LabelledRow
from pipeline.capture.write import write_cache
from pipeline.config import (
    AuditConfig,
    DataConfig,
    EstimateConfig,
    EvaluateConfig,
    PredictConfig,
    ReportConfig,
    TrainTeacherConfig,
)
from pipeline.errors import BadRowError, ContractError, MisuseError, ModelError
from pipeline.evaluation.report.report import report
from pipeline.evaluation.run import run as evaluate
from pipeline.evaluation.table import format_table
from pipeline.models.detect import detect_task
from pipeline.models.initialize import Shape, make_student
from pipeline.models.predict import run as predict
from pipeline.records import Columns, Full, Loss, Sampled
from pipeline.tasks import get_task
from pipeline.training.batches.collate import Collator, Picked, to_tensors
from pipeline.training.forward import attach_loss, detach_loss
from pipeline.training.teacher import run as train_teacher
from tests.conftest import TOPICS
from tests.support.once import once
from tests.support.teaching import train, write

TASK = "seq2seq-lm"
PAIRS = Columns(text=None, prompt="source", completion="target")


def small(path: Path, tokenizer: Any, seed: int = 0, kind: str = "t5") -> Path:
    set_seed(seed)
    sizes: dict[str, Any] = {
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 48,
        "num_layers": 1,
        "num_heads": 2,
        "dropout_rate": 0.0,
    }
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        pad_token_id=0,
        eos_token_id=tokenizer.sep_token_id,
        decoder_start_token_id=0,
        **sizes,
    )
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def pairs(seed: int, count: int) -> dict[str, list[str]]:
    """Return pairs whose target has the last word of each source word's topic, with noise."""
    rng = random.Random(seed)
    found: dict[str, list[str]] = {"source": [], "target": []}
    for _ in range(count):
        topics = rng.choices(list(TOPICS), k=2)
        found["source"].append(" ".join(TOPICS[name][0] for name in topics))
        said = [rng.choice(list(TOPICS)) if rng.random() < 0.2 else name for name in topics]
        found["target"].append(" ".join(TOPICS[name][-1] for name in said))
    return found


def texts() -> DatasetDict:
    return DatasetDict({"train": Dataset.from_dict(pairs(0, 300)), "test": Dataset.from_dict(pairs(1, 60))})


@pytest.fixture
def teacher(tmp_path, bert_tokenizer) -> Path:
    def make(folder: Path) -> None:
        base = small(folder / "base", bert_tokenizer)
        data = DataConfig(
            dataset=str(write(folder / "data", texts())), prompt_column="source", completion_column="target"
        )
        metrics = train_teacher(
            TrainTeacherConfig(
                task=TASK,
                data=data,
                model=str(base),
                output=str(folder / "teacher"),
                epochs=20,
                batch_size=16,
                learning_rate=5e-3,
            )
        )
        assert metrics["loss"] < 0.8

    once((__name__, "teacher"), make, tmp_path)
    return tmp_path / "teacher"


@pytest.fixture
def cache(tmp_path, teacher) -> Cache:
    def make(folder: Path) -> None:
        softlabel.cache_logits(
            str(teacher),
            texts(),
            folder / "cache",
            task=TASK,
            columns=PAIRS,
            rows_per_shard=70,
            batch_tokens=256,
            encoding=Sampled(4.0),
        )

    once((__name__, "cache"), make, tmp_path)
    return Cache.open(tmp_path / "cache")


def test_cached_values_are_the_models(tmp_path, teacher):
    softlabel.cache_logits(
        str(teacher), texts(), tmp_path / "full", task=TASK, columns=PAIRS, encoding=Full(), batch_tokens=256
    )
    cache = Cache.open(tmp_path / "full")
    model = AutoModelForSeq2SeqLM.from_pretrained(teacher).eval()
    assert detect_task(str(teacher)).name == TASK
    assert not verify(cache.root).problems
    source = texts()["test"]
    for row in cache.dataset("test"):
        example = row.example
        assert example.supervised is not None
        assert example.labels is not None
        ids, labels = (
            torch.from_numpy(part.astype(np.int64))[None]
            for part in (example.input_ids[~example.supervised], example.labels)
        )
        assert cache.tokenizer.decode(labels[0], skip_special_tokens=True) == source[example.source_row]["target"]
        with torch.no_grad():
            logits = model(input_ids=ids, labels=labels).logits[0]
        torch.testing.assert_close(
            row.soft.top_logprobs.view_as(logits), torch.log_softmax(logits, -1), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("soft_weight", [0.0, 0.7])
def test_the_fused_loss_is_the_dense_one(cache, teacher, soft_weight):
    """Compares value and gradients in float64 on the same batch."""
    task, loss = get_task(TASK), Loss(0.3, soft_weight)
    batch = Collator(task, cache.tokenizer, 1.0).collate(
        Picked((cache.dataset("train").segments(np.arange(12)),), np.ones(12, dtype=bool))
    )
    found = {}
    for fused in (True, False):
        model = AutoModelForSeq2SeqLM.from_pretrained(teacher, dtype=torch.float64).train()
        with pytest.MonkeyPatch.context() as patch:
            if not fused:
                patch.setattr("pipeline.training.forward._read_transform", lambda model: (None, "asked to be dense"))
            is_fused = attach_loss(
                model, task=task, num_classes=cache.manifest.contract.num_classes, loss=loss, temperature=1.0
            )
        assert is_fused == fused
        tensors = to_tensors(batch)
        given = {name: tensors[name] for name in ("supervised", "labels", "weights", "soft_weights", "target")}
        total = model(**tensors["inputs"], distillation=given)["total"]
        total.backward()
        detach_loss(model)
        found[fused] = total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found[True][0], found[False][0], atol=1e-6, rtol=1e-6)
    assert found[True][1].keys() == found[False][1].keys()
    for name, gradient in found[True][1].items():
        torch.testing.assert_close(gradient, found[False][1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.full
def test_a_student_comes_close_to_its_teacher_and_a_control_beside_it(tmp_path, cache, teacher, bert_tokenizer):
    start = small(tmp_path / "start", bert_tokenizer, seed=1)
    long = {"max_steps": 200, "learning_rate": 5e-3}
    train(cache, start, tmp_path / "untrained", max_steps=1, learning_rate=1e-9)
    train(cache, start, tmp_path / "student", **long)
    train(cache, start, tmp_path / "control", **long, hard_weight=1.0, soft_weight=0.0)
    found = evaluate(
        EvaluateConfig(
            cache=str(cache.root), student=tuple(f"{name}={tmp_path / name}" for name in ("untrained", "student", "control")),
            teacher=str(teacher), write_rows=40,
        )
    )  # fmt: skip
    assert "chrf: of the texts that the model writes" in format_table(found)
    before, student, control = found.students
    assert found.main_metric == "loss"
    assert student.metrics["loss"] < 0.7 * before.metrics["loss"]
    assert student.metrics["loss"] < 1.3 * found.teacher.metrics["loss"]
    assert control.metrics["loss"] < before.metrics["loss"]
    assert student.kl is not None
    assert before.kl is not None
    assert student.kl < 0.3 * before.kl
    assert student.metrics["chrf"] > before.metrics["chrf"] + 10
    assert found.teacher.metrics["chrf"] > 50


@pytest.mark.full
def test_pages_show_the_targets(tmp_path, cache, teacher, bert_tokenizer):
    lines = "\n".join(describe(cache, split="test", rows=1, tokens=5, top=3))
    assert "target token" in lines
    write_page(cache, tmp_path / "page.html")
    assert "is the target token of the data at" in (tmp_path / "page.html").read_text()
    card = (cache.root / "README.md").read_text()
    assert "`input_ids` has the tokens of the source and behind them those of the target" in card
    start = small(tmp_path / "start", bert_tokenizer)
    train(cache, start, tmp_path / "a", max_steps=20)
    train(cache, start, tmp_path / "b", max_steps=5)
    found = report(
        ReportConfig(
            cache=(str(cache.root),), student=(f"a={tmp_path / 'a'}",), control=(f"b={tmp_path / 'b'}",), output=str(tmp_path / "report"),
            rounds=0, resamples=200,
        )
    )  # fmt: skip
    assert found.slice_kind.startswith("target token, by how often")
    assert any(" -> " in (item.text or " -> ") for item in found.examples)
    assert "AutoModelForSeq2SeqLM" in (tmp_path / "a" / "README.md").read_text()


def test_what_is_refused(tmp_path, cache, teacher, lm_tokenizer, bert_tokenizer):
    other = small(tmp_path / "other", bert_tokenizer)
    lm_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ContractError, match="the student has another tokenizer, and the tokens of the targets are"):
        train(cache, other, tmp_path / "a", max_steps=1)
    with pytest.raises(MisuseError, match="--store-text: rows of --task seq2seq-lm hold source and target as tokens"):
        softlabel.cache_logits(str(teacher), texts(), tmp_path / "b", task=TASK, columns=PAIRS, store_text=True)
    with pytest.raises(MisuseError, match="--task seq2seq-lm reads --prompt-column"):
        softlabel.cache_logits(str(teacher), texts(), tmp_path / "c", task=TASK)
    empty = Dataset.from_dict({"source": ["a dog", "a cat"], "target": ["a", ""]})
    with pytest.raises(BadRowError, match="row 1: target is empty"):
        softlabel.cache_logits(str(teacher), empty, tmp_path / "d", task=TASK, columns=PAIRS)
    with pytest.raises(MisuseError, match="--write-rows: expected at least 0"):
        EvaluateConfig(cache="x", student=("y",), write_rows=-1)


def test_texts_are_written(teacher):
    source = texts()["test"][0]
    (found,) = predict(PredictConfig(model=str(teacher), text=(source["source"],), max_new_tokens=5))
    assert found.target is not None
    assert set(found.target.split()) <= {words[-1] for words in TOPICS.values()}


def test_estimate_audit_merge_and_lora(tmp_path, cache, teacher, caplog):
    write(tmp_path / "rows", texts())
    data = DataConfig(dataset=str(tmp_path / "rows"), prompt_column="source", completion_column="target")
    found = estimate(EstimateConfig(task=TASK, data=data, teacher=str(teacher)))
    assert any(isinstance(line.encoding, Sampled) for line in found.encodings)
    assert audit(AuditConfig(cache=str(cache.root), teacher=str(teacher), rows=16)).verdict == "agrees"
    with caplog.at_level(logging.INFO):
        joined = merge([cache, cache], tmp_path / "joined")
    assert not verify(joined.root).problems
    pytest.importorskip("peft")
    train(cache, teacher, tmp_path / "lora", max_steps=3, lora_r=2, lora_target=("q", "v"))
    assert detect_task(str(tmp_path / "lora")).name == TASK


@pytest.mark.parametrize("kind", ["bart", "m2m_100", "blenderbot"])
def test_other_architectures(tmp_path, bert_tokenizer, kind):
    """BART supports masked language modelling too.

    M2M (NLLB) and Blenderbot have no method that builds the decoder's input.
    """
    set_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=len(bert_tokenizer), **{**LAYERS["bart"], "decoder_start_token_id": 2, "eos_token_id": 3}
    )
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "teacher")
    bert_tokenizer.save_pretrained(tmp_path / "teacher")
    assert detect_task(str(tmp_path / "teacher")).name == TASK
    data = texts()["train"].select(range(8))
    made = softlabel.cache_logits(
        str(tmp_path / "teacher"), data, tmp_path / "cache", task=TASK, columns=PAIRS, encoding=Full()
    )
    for row, source, target in zip(made.dataset("train"), data["source"], data["target"], strict=True):
        labels = bert_tokenizer(text_target=target, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected = model(**bert_tokenizer(source, return_tensors="pt"), labels=labels).logits[0]
        torch.testing.assert_close(
            row.soft.top_logprobs.view_as(expected), expected.log_softmax(-1), rtol=1e-4, atol=1e-4
        )
    train(made, tmp_path / "teacher", tmp_path / "student", max_steps=1)
    (found,) = predict(PredictConfig(model=str(tmp_path / "student"), text=("a dog",), max_new_tokens=3))
    assert found.target is not None


def test_rows_of_ones_own(tmp_path, cache, teacher, bert_tokenizer):
    def row(**given: Any) -> LabelledRow:
        flags = [False, False, True, True]
        return LabelledRow([5, 6, 7, 3], logits=torch.randn(2, len(bert_tokenizer)), **{"supervised": flags, **given})

    settings: dict[str, Any] = {"task": TASK, "tokenizer": bert_tokenizer, "encoding": Sampled(4.0), "teacher": "mine"}
    (found,) = write_cache([row()], tmp_path / "a", **settings).dataset("train")
    assert found.example.labels.tolist() == [7, 3]
    for given, expected in (
        ({"labels": [7, 4]}, "row 0: labels: expected the tokens of the target, .7, 3., found .7, 4."),
        ({"supervised": [True, True, False, False]}, "row 0: supervised: expected the tokens of the target, behind"),
        ({"supervised": [False, True, True, False]}, "row 0: supervised: expected the tokens of the target, behind"),
    ):
        with pytest.raises(BadRowError, match=expected):
            write_cache([row(**given)], tmp_path / "b", **settings)
    with pytest.raises(MisuseError, match="'teacher' is the name of --teacher"):
        evaluate(EvaluateConfig(cache=str(cache.root), student=(f"teacher={teacher}",), teacher=str(teacher)))
    with pytest.raises(MisuseError, match="--max-length 1: expected 2 or more"):
        softlabel.cache_logits(str(teacher), texts(), tmp_path / "c", task=TASK, columns=PAIRS, max_length=1)


LAYERS = {
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 3, "num_heads": 2, "pad_token_id": 0, "decoder_start_token_id": 0},
    "bart": {"d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
             "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0},
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
def test_students_are_made_of_layers_or_of_a_shape(tmp_path, bert_tokenizer, kind):
    """Applies to encoder and decoder alike.

    In T5 the first layer of each stack has the position biases, whichever layer is copied to it.
    """
    set_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(bert_tokenizer), **LAYERS[kind])
    teacher = AutoModelForSeq2SeqLM.from_config(config)
    teacher.save_pretrained(tmp_path / "teacher")
    bert_tokenizer.save_pretrained(tmp_path / "teacher")
    make_student(str(tmp_path / "teacher"), tmp_path / "copied", layers=(1, 2))
    copied = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "copied")
    ours, theirs = copied.state_dict(), teacher.state_dict()
    for part in ("encoder", "decoder"):
        names = [n for n in theirs if f"{part}.block.2." in n or f"{part}.layers.2." in n]
        assert len(names) > 5
        for name in names:
            copy = name.replace(".block.2.", ".block.1.").replace(".layers.2.", ".layers.1.")
            torch.testing.assert_close(ours[copy], theirs[name])
    made = make_student(str(tmp_path / "teacher"), tmp_path / "small", config=Shape(2, 16, 2))
    small = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "small")
    assert made.num_layers == 2
    ids = torch.tensor([[5, 6, 7]])
    uneven = "num_decoder_layers" if kind == "t5" else "decoder_layers"
    config = AutoConfig.for_model(kind, vocab_size=len(bert_tokenizer), **{**LAYERS[kind], uneven: 2})
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "uneven")
    bert_tokenizer.save_pretrained(tmp_path / "uneven")
    with pytest.raises(ModelError, match=r"expected an encoder and a decoder of 3 layers each to choose from, found"):
        make_student(str(tmp_path / "uneven"), tmp_path / "no", layers=(0, 1))
    for model in (copied, small):
        assert model(input_ids=ids, labels=ids).logits.shape == (1, 3, len(bert_tokenizer))
        lists = [name for name, _ in model.named_modules() if re.fullmatch(r".*(block|layers)\.\d+", name)]
        assert len(lists) == 4
