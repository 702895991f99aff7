"""Scores end to end.

Covers data, teacher, cache, student and evaluation, and rankings by scores.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForSequenceClassification

import pipeline as softlabel
from pipeline.cache import Cache, verify
from pipeline.cache.format.moments import scale_of
from pipeline.cache.format.sanity import manifest_problem
from pipeline.cache.transforms.convert import convert
from pipeline.cache.transforms.filter import filter_rows
from pipeline.cache.transforms.merge import merge
from pipeline.cache.views.inspection import describe
from pipeline.cache.views.page import write_page
from pipeline.capture.audit import run as audit
from pipeline.capture.estimate.run import run as estimate
from pipeline.capture.labelled import LabelledRow
from pipeline.capture.write import write_cache
from pipeline.config import AuditConfig, DataConfig, EstimateConfig, PredictConfig, ReportConfig, TrainTeacherConfig
from pipeline.errors import BadRowError, ContractError, EncodingError, MisuseError, ModelError, SourceError
from pipeline.evaluation import evaluate
from pipeline.evaluation.report.report import report
from pipeline.evaluation.run import groups_of
from pipeline.evaluation.table import format_table
from pipeline.models.detect import detect_task
from pipeline.models.predict import run as predict
from pipeline.records import Columns, Full, Moments, Predictions, Score, TopK
from pipeline.tasks import get_task
from pipeline.training.batches.held_out import hold_out
from pipeline.training.batches.mixing import make_mixture
from pipeline.training.teacher import run as train_teacher
from tests.conftest import TOPICS, WORDS
from tests.support.once import once
from tests.support.teaching import pretrained, train, write

TASK = "sequence-regression"
NAMES = ("label_0", "label_1")
SMALL = {"num_hidden_layers": 1, "initializer_range": 0.1}
LONG = {"max_steps": 250, "learning_rate": 3e-3}


def rows(seed: int, count: int) -> dict[str, list[Any]]:
    """Return texts with two scores in very different units that depend on the words."""
    rng = random.Random(seed)
    found: dict[str, list[Any]] = {"text": [], "label": []}
    for _ in range(count):
        topics = [name for name in TOPICS if rng.random() < 0.5]
        words = [TOPICS[name][0] for name in topics] + [rng.choice(WORDS[:6]) for _ in range(2)]
        rng.shuffle(words)
        weights = {name: float(i) for i, name in enumerate(TOPICS)}
        found["text"].append(" ".join(words))
        found["label"].append([100.0 + 50.0 * sum(weights[name] for name in topics), 0.01 * len(topics)])
    return found


def texts() -> DatasetDict:
    train, test = rows(0, 240), rows(1, 60)
    train["label"] = [None if i % 8 == 7 else scores for i, scores in enumerate(train["label"])]
    return DatasetDict({"train": Dataset.from_dict(train), "test": Dataset.from_dict(test)})


@pytest.fixture
def teacher(tmp_path, bert_tokenizer) -> Path:
    """Return a teacher whose scores are close to the data's.

    The bias of its head is set, since 100 is far from its initial scores.
    """

    def make(folder: Path) -> None:
        base = pretrained(folder / "base", bert_tokenizer, **SMALL)
        data = DataConfig(dataset=str(write(folder / "data", texts())))
        metrics = train_teacher(
            TrainTeacherConfig(
                task=TASK, data=data, model=str(base), output=str(folder / "teacher"), epochs=20, batch_size=8, learning_rate=2e-3
            )
        )  # fmt: skip
        assert metrics["pearson"] > 0.9

    once((__name__, "teacher"), make, tmp_path)
    return tmp_path / "teacher"


@pytest.fixture
def cache(tmp_path, teacher) -> Cache:
    def make(folder: Path) -> None:
        softlabel.cache_logits(str(teacher), texts(), folder / "cache", task=TASK, rows_per_shard=70, batch_tokens=256)

    once((__name__, "cache"), make, tmp_path)
    return Cache.open(tmp_path / "cache")


def test_cached_values_are_the_models(cache, teacher):
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    assert model.config.problem_type == "regression"
    assert detect_task(str(teacher)).name == TASK
    contract = cache.manifest.contract
    assert (contract.num_classes, contract.label_names, contract.encoding) == (1, NAMES, Score())
    assert not verify(cache.root).problems
    source = texts()["train"]
    for row in cache.dataset("train"):
        known = source[row.example.source_row]["label"]
        expected = np.array([math.nan] * 2 if known is None else known, dtype=np.float32)
        np.testing.assert_array_equal(row.example.labels, expected)
        with torch.no_grad():
            scores = model(input_ids=torch.from_numpy(row.example.input_ids.astype(np.int64))[None]).logits[0]
        torch.testing.assert_close(row.soft.top_logprobs, scores, atol=1e-4, rtol=1e-4)


@pytest.mark.full
def test_a_student_comes_close_to_its_teacher_and_a_control_beside_it(tmp_path, cache, bert_tokenizer):
    start = pretrained(tmp_path / "start", bert_tokenizer, seed=1, **SMALL)
    train(cache, start, tmp_path / "untrained", max_steps=1, learning_rate=1e-9)
    train(cache, start, tmp_path / "student", **LONG)
    train(cache, start, tmp_path / "control", **LONG, hard_weight=1.0, soft_weight=0.0)
    found = evaluate(cache, {name: tmp_path / name for name in ("untrained", "student", "control")})
    before, student, control = found.students
    assert found.main_metric == "pearson"
    assert found.teacher.metrics["pearson"] > 0.9
    assert before.agreement is not None
    assert before.agreement < 0.5
    assert student.agreement is not None
    assert student.agreement > 0.9
    assert control.agreement is not None
    assert control.agreement > 0.7
    assert student.kl is not None
    assert before.kl is not None
    assert student.kl < 0.25 * before.kl


@pytest.mark.full
def test_a_student_with_another_tokenizer_learns_from_the_texts(tmp_path, cache, lm_tokenizer):
    start = pretrained(tmp_path / "start", lm_tokenizer, seed=1, **SMALL)
    train(cache, start, tmp_path / "student", **LONG)
    agreement = evaluate(cache, {"student": tmp_path / "student"}).students[0].agreement
    assert agreement is not None
    assert agreement > 0.85


def test_the_unit_is_the_manifests_and_follows_the_rows(tmp_path, cache):
    def of_rows(each: Cache) -> tuple[np.ndarray, np.ndarray]:
        scores = np.stack([row.soft.top_logprobs.double().numpy() for row in each.dataset("train")])
        return scores.mean(0), scores.std(0, ddof=1)

    joined = merge([cache, cache], tmp_path / "joined")
    some = filter_rows(cache, tmp_path / "some", where="source_row % 3 = 1")
    for each in (cache, joined, some):
        scale = scale_of(each.manifest)
        assert scale is not None
        for found, expected in zip((scale.mean, scale.std), of_rows(each), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert not verify(each.root).problems


def test_a_checkpoint_is_a_model_of_the_datas_scores(tmp_path, cache, bert_tokenizer):
    """Its scores are not standardised.

    A resumed run continues from it as if it had not been interrupted.
    """
    start = pretrained(tmp_path / "start", bert_tokenizer, seed=1, **SMALL)
    settings = {"max_steps": 60, "learning_rate": 3e-3, "training": {"save_strategy": "steps", "save_steps": 30}}
    train(cache, start, tmp_path / "whole", **settings)
    row = next(iter(cache.dataset("test")))
    ids = torch.from_numpy(row.example.input_ids.astype(np.int64))[None]

    def scores(path: Path) -> torch.Tensor:
        with torch.no_grad():
            return AutoModelForSequenceClassification.from_pretrained(path).eval()(input_ids=ids).logits[0]

    torch.testing.assert_close(scores(tmp_path / "whole" / "checkpoint-60"), scores(tmp_path / "whole"))
    assert float(scores(tmp_path / "whole" / "checkpoint-30")[0]) > 60
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoint-60")
    for name in ("distillation.json", "model.safetensors"):
        (tmp_path / "half" / name).unlink()
    train(cache, start, tmp_path / "half", **settings, resume=True)
    torch.testing.assert_close(scores(tmp_path / "half"), scores(tmp_path / "whole"))


def test_caches_are_not_converted(tmp_path, cache):
    with pytest.raises(EncodingError, match="--encoding top-k: the cache holds scores, which have one encoding"):
        convert(cache, tmp_path / "smaller", encoding=TopK(1))


def test_an_encoding_of_distributions_is_refused(tmp_path, teacher):
    with pytest.raises(
        MisuseError, match="--encoding full: is for distributions, which --task sequence-regression does not have"
    ):
        softlabel.cache_logits(str(teacher), texts(), tmp_path / "c", task=TASK, encoding=Full())


def test_models_of_other_heads_are_refused(tmp_path, cache, bert_tokenizer, lm_tokenizer):
    base = pretrained(tmp_path / "base", bert_tokenizer, **SMALL)
    for name, settings in {
        "classes": {"problem_type": "single_label_classification", "num_labels": 2},
        "three": {"num_labels": 3},
    }.items():
        model = AutoModelForSequenceClassification.from_pretrained(base, **settings)
        model.save_pretrained(tmp_path / name)
        bert_tokenizer.save_pretrained(tmp_path / name)
    with pytest.raises(
        ModelError, match=r"expected a model that gives scores \(problem_type regression\), found single_label"
    ):
        softlabel.cache_logits(str(tmp_path / "classes"), texts(), tmp_path / "a", task=TASK)
    with pytest.raises(BadRowError, match="label: expected 3 scores, as many as the model has outputs, found 2"):
        softlabel.cache_logits(str(tmp_path / "three"), texts(), tmp_path / "b", task=TASK)
    with pytest.raises(ContractError, match="expected 2 labels, as the cache has"):
        train(cache, tmp_path / "three", tmp_path / "c", max_steps=1)
    with pytest.raises(ModelError, match="expected one output to rank by, found 3"):
        softlabel.cache_logits(str(tmp_path / "three"), lists(), tmp_path / "d", task="text-ranking", columns=RANKING)
    with pytest.raises(
        MisuseError, match=r"--lora-r: an adapter_config\.json does not record that the model gives scores"
    ):
        train(cache, base, tmp_path / "e", lora_r=2)


def test_rows_of_ones_own(tmp_path, bert_tokenizer):
    settings: dict[str, Any] = {"task": TASK, "tokenizer": bert_tokenizer, "encoding": Score(), "teacher": "mine"}
    scores = [[1.5, -2.0], [0.25, 3.0], [7.0, 0.0]]
    labels: list[Any] = [[1.0, math.nan], None, [7, 1]]

    def row(i: int) -> LabelledRow:
        return LabelledRow([2, 5 + i, 3], logits=torch.tensor(scores[i])[:, None], labels=labels[i], text=f"text {i}")

    made = write_cache([row(i) for i in range(3)], tmp_path / "a", label_names=("x", "y"), **settings)
    assert not verify(made.root).problems
    found = list(made.dataset("train"))
    assert [each.soft.top_logprobs.tolist() for each in found] == scores
    assert str([each.example.labels.tolist() for each in found]) == str([[1.0, math.nan], [math.nan] * 2, [7.0, 1.0]])
    assert [each.teacher_nll_sum for each in found] == [0.25, 0.0, 1.0]
    bad = dataclasses.replace(row(0), labels=[1.0])
    with pytest.raises(BadRowError, match="row 0: labels: expected 2, one for each output, found 1"):
        write_cache([bad], tmp_path / "b", label_names=("x", "y"), **settings)
    with pytest.raises(BadRowError, match="row 0: labels: expected scores, found"):
        write_cache(
            [dataclasses.replace(row(0), labels=["a", "b"])], tmp_path / "c", label_names=("x", "y"), **settings
        )
    with pytest.raises(MisuseError, match=r"give label_names=...: rows have one position per name"):
        write_cache([row(0)], tmp_path / "d", **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: replace(m, contract=replace(m.contract, num_classes=2)), "num_classes: expected 1 for a score, found 2"),
        (lambda m: replace(m, contract=replace(m.contract, encoding=Full())), "encoding: expected score, as the task sequence-regression needs, found full"),
        (lambda m: replace(m, shards=tuple(replace(s, moments=()) for s in m.shards)), "shards.0.moments: expected 2, found 0"),
        (lambda m: replace(m, shards=tuple(replace(s, moments=(Moments(1, 0.0, 0.0),) * 2) for s in m.shards)), "moments: expected finite ones of"),
    ],
)  # fmt: skip
def test_manifests_that_no_capture_writes(cache, change, message):
    assert manifest_problem(cache.manifest) is None
    assert re.search(message, str(manifest_problem(change(cache.manifest))))


# ----------------------------------------------------------------------------------------- rankings


def queries(seed: int, count: int) -> dict[str, list[Any]]:
    """Return lists of 3 to 6 documents in random order.

    A document's relevance, 0 to 2, depends on its topic's word.
    """
    rng = random.Random(seed)
    found: dict[str, list[Any]] = {"query": [], "document": [], "label": [], "id": []}
    grades = {name: float(i) for i, name in enumerate(TOPICS)}
    for number in range(count):
        for _ in range(rng.randint(3, 6)):
            topic = rng.choice(list(TOPICS))
            words = [TOPICS[topic][0], *(rng.choice(WORDS[:6]) for _ in range(2))]
            rng.shuffle(words)
            found["query"].append(rng.choice(WORDS[:6]))
            found["document"].append(" ".join(words))
            found["label"].append(grades[topic])
            found["id"].append(f"q{number}")
    return found


RANKING = Columns(text="query", text_pair="document", label="label", group="id")


def lists() -> DatasetDict:
    return DatasetDict({"train": Dataset.from_dict(queries(0, 80)), "test": Dataset.from_dict(queries(1, 30))})


@pytest.fixture
def ranked(tmp_path, bert_tokenizer) -> Cache:
    def make(folder: Path) -> None:
        base = pretrained(folder / "base", bert_tokenizer, **SMALL)
        data = DataConfig(
            dataset=str(write(folder / "lists", lists())),
            text_column="query", text_pair_column="document", group_column="id",
        )  # fmt: skip
        metrics = train_teacher(
            TrainTeacherConfig(
                task="text-ranking", data=data, model=str(base), output=str(folder / "ranker"), epochs=25, batch_size=16, learning_rate=3e-3
            )
        )  # fmt: skip
        assert metrics["ndcg@10"] > 0.9
        softlabel.cache_logits(
            str(folder / "ranker"), lists(), folder / "ranked", task="text-ranking", columns=RANKING, rows_per_shard=50, batch_tokens=256
        )  # fmt: skip

    once((__name__, "ranked"), make, tmp_path)
    return Cache.open(tmp_path / "ranked")


@pytest.mark.parametrize("divergence", ["margin-mse", "listwise-kl", "mse"])
def test_a_student_ranks_as_its_teacher(tmp_path, ranked, bert_tokenizer, divergence):
    start = pretrained(tmp_path / "start", bert_tokenizer, seed=1, **SMALL)
    train(ranked, start, tmp_path / "untrained", max_steps=1, learning_rate=1e-9)
    train(ranked, start, tmp_path / "student", max_steps=120, learning_rate=3e-3, divergence=divergence)
    found = evaluate(ranked, {name: tmp_path / name for name in ("untrained", "student")})
    before, student = found.students
    assert found.main_metric == "ndcg@10"
    assert found.teacher.metrics["ndcg@10"] > 0.95
    assert before.metrics["ndcg@10"] < 0.9
    assert student.metrics["ndcg@10"] > 0.95
    assert student.retention_interval is not None
    text = format_table(found)
    assert "interval by bootstrap over lists" in text
    assert "ndcg@10: normalised discounted cumulative gain" in text


def test_lists_stay_whole_in_shards_row_groups_and_transforms(tmp_path, ranked):
    """Shards of at most 50 rows are shorter where needed, so that batches hold whole lists."""
    seen: dict[tuple[str, int], int] = {}
    assert len(ranked.manifest.split_shards("train")) > 4
    for split in ranked.splits:
        dataset = ranked.dataset(split)
        groups = dataset.column("score_group")
        for number, (start, stop) in enumerate(itertools.pairwise(dataset.starts.tolist())):
            for group in groups[start:stop].tolist():
                assert seen.setdefault((split, group), number) == number
    assert len(seen) == 110
    assert not verify(ranked.root).problems
    kept = filter_rows(ranked, tmp_path / "kept", where="position_labels[1] < 1")
    assert set(kept.dataset("test").column("score_group")) <= {group for split, group in seen if split == "test"}


def test_rows_in_one_read_are_those_of_a_large_shard(tmp_path, ranked):
    softlabel.cache_logits(
        str(ranked.root.parent / "ranker"), lists(), tmp_path / "large", task="text-ranking", columns=RANKING, batch_tokens=256
    )  # fmt: skip
    large = Cache.open(tmp_path / "large")
    for name in ("score_group", "content_hash", "source_row"):
        np.testing.assert_array_equal(large.dataset("train").column(name), ranked.dataset("train").column(name))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"columns": replace(RANKING, group=None)}, MisuseError, "--task text-ranking needs --group-column"),
        ({"task": TASK}, MisuseError, "--group-column: names the lists that scores rank, and --task sequence-regression ranks none"),
        ({"task": "sequence-classification"}, MisuseError, "--group-column: names the lists"),
    ],
)  # fmt: skip
def test_columns_of_lists_go_with_rankings(tmp_path, ranked, change, error, message):
    settings = {"task": "text-ranking", "columns": RANKING, **change}
    with pytest.raises(error, match=message):
        softlabel.cache_logits(str(ranked.root.parent / "ranker"), lists(), tmp_path / "c", **settings)


def test_a_list_of_one_row_stops_the_capture_or_is_set_aside(tmp_path, ranked):
    rows = lists()["train"].to_list()[:20]
    alone = {**rows[0], "id": "alone"}
    data = DatasetDict({"train": Dataset.from_list([*rows, alone])})
    settings: dict[str, Any] = {"task": "text-ranking", "columns": RANKING}
    teacher = str(ranked.root.parent / "ranker")
    with pytest.raises(
        BadRowError, match="row 20: id: 'alone' is a list of one row, which has nothing to be ranked against"
    ):
        softlabel.cache_logits(teacher, data, tmp_path / "a", **settings)
    made = softlabel.cache_logits(teacher, data, tmp_path / "b", **settings, on_bad_row="skip")
    assert made.manifest.bad_rows == 1
    assert len(made.dataset("train")) == 20
    apart = DatasetDict({"train": Dataset.from_list([*rows, rows[0]])})
    with pytest.raises(SourceError, match="are not consecutive"):
        softlabel.cache_logits(teacher, apart, tmp_path / "c", **settings)


def test_losses_of_lists_need_lists_and_no_token_budget(tmp_path, cache, ranked, bert_tokenizer):
    start = pretrained(tmp_path / "start", bert_tokenizer, **SMALL)
    with pytest.raises(
        MisuseError, match="--divergence margin-mse: compares the rows of a group, and the cache names no groups"
    ):
        train(cache, start, tmp_path / "a", divergence="margin-mse")
    with pytest.raises(MisuseError, match="--batch-tokens: batches of lists are cut by rows"):
        train(ranked, start, tmp_path / "b", batch_tokens=512)
    with pytest.raises(MisuseError, match="--hard-labels teacher: scores have no most likely class"):
        train(ranked, start, tmp_path / "c", hard_labels="teacher")


def test_rankings_of_ones_own(tmp_path, bert_tokenizer):
    def row(i: int, group: str | None) -> LabelledRow:
        return LabelledRow([2, 5 + i, 3], logits=torch.tensor([[float(i)]]), labels=[i], group=group)

    settings: dict[str, Any] = {
        "task": "text-ranking", "tokenizer": bert_tokenizer, "encoding": Score(), "teacher": "mine", "label_names": ("x",)
    }  # fmt: skip
    made = write_cache([row(0, "a"), row(1, "a"), row(2, "b"), row(3, "b")], tmp_path / "a", **settings)
    groups = made.dataset("train").column("score_group").tolist()
    assert groups[0] == groups[1] != groups[2] == groups[3]
    assert not verify(made.root).problems
    with pytest.raises(MisuseError, match=r"need group=\.\.\."):
        write_cache([row(0, None)], tmp_path / "b", **settings)
    with pytest.raises(BadRowError, match="row 1: expected a group, as the first row has, found none"):
        write_cache([row(0, "a"), row(1, None)], tmp_path / "c", **settings)


def test_rows_are_held_out_by_lists(ranked):
    dataset = ranked.dataset("train")
    found = hold_out(dataset, None, by="score_group")
    assert found is not None
    groups = dataset.column("score_group")
    assert not set(groups[found.measured]) & set(groups[found.left])


def test_scores_that_say_nothing_are_told(tmp_path, bert_tokenizer, caplog):
    """Warns of a teacher whose scores are noise.

    Also warns of a teacher whose scores are in another unit than the data's, if hard labels are
    used.
    """
    base = pretrained(tmp_path / "base", bert_tokenizer, **SMALL)
    settings: dict[str, Any] = {
        "task": TASK, "tokenizer": bert_tokenizer, "encoding": Score(), "teacher": "mine", "label_names": ("x",)
    }  # fmt: skip
    noise = np.random.default_rng(0).normal(size=(2, 60))

    def made(name: str, scores: np.ndarray, labels: np.ndarray) -> Cache:
        rows = [
            LabelledRow([2, 5 + i, 3], logits=torch.tensor([[float(s)]]), labels=[y], text=f"text {i}")
            for i, (s, y) in enumerate(zip(scores, labels, strict=True))
        ]
        return write_cache(rows, tmp_path / name, **settings)

    with caplog.at_level(logging.WARNING):
        made("chance", noise[0], noise[1])
    assert "output 0: the correlation of the teacher's scores with the data's is" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        other = made("unit", 100 + 30 * noise[0], noise[0])
        assert "correlation" not in caplog.text
        train(other, base, tmp_path / "a", max_steps=1, hard_weight=1.0, soft_weight=0.0)
        assert "another unit" not in caplog.text
        train(other, base, tmp_path / "b", max_steps=1)
    assert "the data's scores (mean" in caplog.text
    assert "are in another unit than the teacher's" in caplog.text


def test_cards_and_pages_speak_of_scores(tmp_path, cache, ranked, bert_tokenizer):
    start = pretrained(tmp_path / "start", bert_tokenizer, **SMALL)
    train(cache, start, tmp_path / "a", max_steps=2, eval_split="test", training={"eval_strategy": "epoch"})
    card = (tmp_path / "a" / "README.md").read_text()
    assert "0.1 * squared error, in standard deviations, with the data's labels + 0.9 * mse from the teacher" in card
    assert "| correlation | " in card
    assert "function_to_apply=" in card
    train(ranked, start, tmp_path / "b", max_steps=2)
    card = (tmp_path / "b" / "README.md").read_text()
    assert "pipeline_tag: text-ranking" in card
    assert "1 * margin-mse from the teacher" in card
    assert "CrossEncoder" in card
    card = (cache.root / "README.md").read_text()
    assert "`teacher_scores[n]`: what the teacher gives" in card
    assert "`position_labels[n]`: the score of the data" in card
    write_page(cache, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "label_0: the teacher&#39;s scores have the mean" in page
    assert "What the teacher gives to each text, beside the score of the data." in page
    assert "label_1, data" in page
    lines = "\n".join(describe(cache, split=None, rows=1, tokens=5, top=3))
    assert "2 scores (label_0, label_1)" in lines
    assert re.search(r"label_0: teacher [0-9.]+, data [0-9.]+; label_1", lines)


@pytest.mark.full
def test_a_report_of_scores(tmp_path, ranked, bert_tokenizer):
    start = pretrained(tmp_path / "start", bert_tokenizer, **SMALL)
    for seed in (0, 1):
        train(ranked, start, tmp_path / f"student{seed}", max_steps=30, seed=seed)
    train(ranked, start, tmp_path / "control", max_steps=5, hard_weight=1.0, soft_weight=0.0)
    found = report(
        ReportConfig(
            cache=(str(ranked.root),),
            student=tuple(f"student={tmp_path / name}" for name in ("student0", "student1")),
            control=(f"control={tmp_path / 'control'}",),
            output=str(tmp_path / "report"),
            rounds=0,
            resamples=200,
        )
    )
    assert found.main_metric == "ndcg@10"
    assert not found.calibrations
    assert all(not line.scaled for line in found.quality)
    (first, *_) = found.comparisons
    assert 0 <= first.p_value <= 1
    text = (tmp_path / "report" / "report.md").read_text()
    for said in (
        "rows that are resampled are whole lists",
        "Intervals resample lists",
        "distance: squared difference from them",
    ):
        assert said in text
    assert "Calibration" not in text
    assert found.examples
    assert all(item.answer.replace(".", "").lstrip("-").isdigit() for item in found.examples)


def test_an_estimate_and_an_audit_of_scores(tmp_path, ranked):
    teacher = str(ranked.root.parent / "ranker")
    write(tmp_path / "rows", lists())
    data = DataConfig(
        dataset=str(tmp_path / "rows"), text_column="query", text_pair_column="document", group_column="id"
    )
    found = estimate(EstimateConfig(task="text-ranking", data=data, teacher=teacher))
    assert [line.encoding for line in found.encodings] == [Score()]
    assert found.encodings[0].fidelity is None
    assert audit(AuditConfig(cache=str(ranked.root), teacher=teacher, rows=16)).verdict == "agrees"


def test_models_give_their_scores(tmp_path, cache, teacher):
    text = next(iter(cache.dataset("test"))).example.text
    assert text is not None
    (found,) = predict(PredictConfig(model=str(teacher), text=(text,)))
    expected = next(iter(cache.dataset("test"))).soft.top_logprobs.tolist()
    assert found.scores == pytest.approx(dict(zip(NAMES, expected, strict=True)), rel=1e-3)


def test_a_score_of_minus_100_is_a_score(tmp_path, bert_tokenizer):
    """Trainer uses -100 for missing labels."""
    rows = {
        "text": [" ".join(WORDS[i % 6 : i % 6 + 2]) for i in range(48)],
        "label": [-100.0 if i % 10 else 100.0 for i in range(48)],
    }
    data = DataConfig(dataset=str(write(tmp_path / "data", DatasetDict({"train": Dataset.from_dict(rows)}))))
    base = pretrained(tmp_path / "base", bert_tokenizer, **SMALL)
    train_teacher(
        TrainTeacherConfig(
            task=TASK,
            data=data,
            model=str(base),
            output=str(tmp_path / "teacher"),
            epochs=2,
            batch_size=4,
            learning_rate=1e-3,
        )
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_capture_of_lists_goes_on_and_grows(tmp_path, ranked):
    teacher, whole = str(ranked.root.parent / "ranker"), queries(5, 30)
    settings: dict[str, Any] = {"task": "text-ranking", "columns": RANKING, "rows_per_shard": 10, "batch_tokens": 256}
    first = softlabel.cache_logits(teacher, Dataset.from_dict(whole), tmp_path / "a", **settings)
    again = softlabel.cache_logits(teacher, Dataset.from_dict(whole), tmp_path / "a", **settings)
    assert again.manifest.cache_id == first.manifest.cache_id
    start = next(i for i, name in enumerate(whole["id"]) if name == "q15")
    half = Dataset.from_dict({name: values[:start] for name, values in whole.items()})
    softlabel.cache_logits(teacher, half, tmp_path / "b", **settings)
    grown = softlabel.cache_logits(teacher, Dataset.from_dict(whole), tmp_path / "b", **settings, append=True)
    for made in (first, grown):
        dataset = made.dataset("train")
        edges = dataset.starts[1:-1]
        groups = dataset.column("score_group")
        assert (groups[edges] != groups[edges - 1]).all()


def test_a_path_has_its_lists_too(tmp_path, ranked):
    write(tmp_path / "rows", lists())
    made = softlabel.cache_logits(
        str(ranked.root.parent / "ranker"), str(tmp_path / "rows"), tmp_path / "c", task="text-ranking", columns=RANKING, batch_tokens=256
    )  # fmt: skip
    assert "score_group" in made.manifest.contract.columns


def test_lists_of_one_name_in_two_caches_stay_apart(tmp_path, ranked):
    """Merged lists with the same name but other rows are separate lists.

    A list with one row in a split does not affect the other split.
    """
    teacher = str(ranked.root.parent / "ranker")
    settings: dict[str, Any] = {"task": "text-ranking", "columns": RANKING, "batch_tokens": 256}
    parts = [
        softlabel.cache_logits(teacher, Dataset.from_dict(queries(seed, 8)), tmp_path / f"part{seed}", **settings)
        for seed in (7, 8)
    ]
    joined = merge(parts, tmp_path / "joined")
    numbers = groups_of(joined, "train")
    assert numbers is not None
    assert numbers.max() + 1 == 16
    rows = queries(9, 3)
    alone = {name: values[:1] for name, values in rows.items()}
    data = DatasetDict({"train": Dataset.from_dict(rows), "test": Dataset.from_dict(alone)})
    made = softlabel.cache_logits(teacher, data, tmp_path / "d", **settings, on_bad_row="skip")
    assert len(made.dataset("train")) == len(rows["id"])


def test_metric_and_interval_are_of_one_statistic():
    """Holds also if an output has fewer labels, or none."""
    task = get_task(TASK)
    rng = np.random.default_rng(0)
    labels = rng.normal(size=(400, 3))
    found = labels * [1, 0.2, 1] + rng.normal(size=(400, 3))
    labels[40:, 1] = np.nan
    labels[:, 2] = np.nan
    predictions = Predictions(
        labels.ravel(), found.ravel(), np.full(1200, np.nan), np.square(found - labels).ravel(), found.ravel(),
        np.repeat(np.arange(400), 3), np.zeros(400), np.zeros(400, dtype=np.int64), ("a", "b", "c"),
    )  # fmt: skip
    sums, weights = task.row_scores(predictions)
    assert sums.sum() / weights.sum() == pytest.approx(task.metrics(predictions, 1)["pearson"])
    expected = np.mean([np.corrcoef(labels[:40, 1], found[:40, 1])[0, 1], np.corrcoef(labels[:, 0], found[:, 0])[0, 1]])
    assert task.metrics(predictions, 1)["pearson"] == pytest.approx(expected)


def test_metrics_of_training_are_those_of_the_saved_student_in_bfloat16(tmp_path, bert_tokenizer):
    """Scores are 2000 +- 5, where bfloat16 has a resolution of 8."""
    rng = np.random.default_rng(0)
    scores = 2000 + 5 * rng.normal(size=200)
    rows = [
        LabelledRow([2, 5 + int(s > 2000), 5 + i % 20, 3], logits=torch.tensor([[s]]), labels=[s], split="train" if i < 160 else "validation", text="x")
        for i, s in enumerate(scores)
    ]  # fmt: skip
    cache = write_cache(
        rows, tmp_path / "c", task=TASK, tokenizer=bert_tokenizer, encoding=Score(), teacher="mine", label_names=("x",)
    )  # fmt: skip
    start = pretrained(tmp_path / "start", bert_tokenizer, **SMALL)
    result = train(
        cache,
        start,
        tmp_path / "s",
        max_steps=60,
        learning_rate=3e-3,
        training={"bf16": True, "use_cpu": True, "eval_strategy": "epoch"},
    )
    exact = evaluate(cache, {"s": tmp_path / "s"}, split="validation").students[0]
    assert result.metrics["mse"] == pytest.approx(exact.metrics["mse"], rel=0.05)


def test_teachers_of_other_units_are_not_mixed(tmp_path, bert_tokenizer):
    def made(name: str, scale: float) -> Cache:
        rows = [
            LabelledRow([2, 5 + i, 3], logits=torch.tensor([[scale * i]]), labels=[float(i)], text="x")
            for i in range(30)
        ]
        return write_cache(
            rows,
            tmp_path / name,
            task=TASK,
            tokenizer=bert_tokenizer,
            encoding=Score(),
            teacher=name,
            label_names=("x",),
        )

    first, second = made("a", 1.0), made("b", 30.0)
    with pytest.raises(ContractError, match="teachers of one student need scores in one unit"):
        make_mixture([first, second], "teachers", ())


def test_own_lists_are_checked(tmp_path, bert_tokenizer):
    def row(i: int, group: str) -> LabelledRow:
        return LabelledRow([2, 5 + i, 3], logits=torch.tensor([[float(i)]]), labels=[i], group=group)

    settings: dict[str, Any] = {
        "tokenizer": bert_tokenizer,
        "encoding": Score(),
        "teacher": "mine",
        "label_names": ("x",),
    }
    with pytest.raises(BadRowError, match="row 2: group 'a': expected the rows of a list one after another"):
        write_cache([row(0, "a"), row(1, "b"), row(2, "a")], tmp_path / "a", task="text-ranking", **settings)
    with pytest.raises(MisuseError, match=r"group=\.\.\. names the lists of rankings"):
        write_cache([row(0, "a"), row(1, "a")], tmp_path / "b", task=TASK, **settings)


def test_equal_texts_are_held_out_together(tmp_path, bert_tokenizer):
    """Holds regardless of their scores."""
    rows = [
        LabelledRow([2, 5 + i // 3 % 100, 5 + i // 300, 3], logits=torch.tensor([[0.0]]), labels=[float(i)], text="x")
        for i in range(900)
    ]
    cache = write_cache(
        rows, tmp_path / "c", task=TASK, tokenizer=bert_tokenizer, encoding=Score(), teacher="mine", label_names=("x",)
    )  # fmt: skip
    found = hold_out(cache.dataset("train"), None, by="input_ids")
    assert found is not None
    texts_of = [tuple(ids.tolist()) for ids in cache.dataset("train").column("input_ids")]
    sides = [{text for text, side in zip(texts_of, part, strict=True) if side} for part in (found.measured, found.left)]
    assert not sides[0] & sides[1]
