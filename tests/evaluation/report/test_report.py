"""The report on tiny models.

Covers a student equal to its teacher, a random student, several seeds, several caches and each
encoding.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset, DatasetDict
from scipy.spatial.distance import jensenshannon
from torchmetrics.functional.classification import multiclass_calibration_error

import pipeline as softlabel
from pipeline.cache.format.manifest import dump, parse
from pipeline.cli import main
from pipeline.config import ReportConfig, TrainStudentConfig
from pipeline.errors import CacheError, ContractError, MisuseError
from pipeline.evaluation.measures.observation import observe_teacher
from pipeline.evaluation.records import Report
from pipeline.evaluation.report.report import report
from pipeline.records import Full, Sampled, TopK
from pipeline.tasks import get_task
from pipeline.training.run import run as train
from tests.conftest import tiny_model
from tests.support.classifier import LABELS, classifier, taught
from tests.support.once import once
from tests.support.profile import in_full, plain_pictures  # noqa: F401 - a fixture


@pytest.fixture
def setting(tmp_path, bert_tokenizer, topics, save_teacher):
    """A cache of a teacher with 75% accuracy, the teacher's directory and a random student's."""
    teacher = classifier(bert_tokenizer)
    path = save_teacher(teacher, bert_tokenizer)
    other = save_teacher(classifier(bert_tokenizer, seed=5), bert_tokenizer, "random")

    def make(folder: Path) -> None:
        rows = taught(topics, teacher, bert_tokenizer)
        softlabel.cache_logits(str(path), rows, folder / "cache", task="sequence-classification")

    once(__name__, make, tmp_path)
    return softlabel.Cache.open(tmp_path / "cache"), str(path), str(other)


def configured(cache, output: Path, **settings) -> ReportConfig:
    return ReportConfig(
        cache=str(cache.root),
        output=str(output),
        **{"rounds": 0, "resamples": 300, "examples": 3, "overwrite": True, **settings},
    )


@pytest.mark.full
def test_the_teacher_as_its_own_student(setting, tmp_path):
    cache, teacher, other = setting
    found = report(configured(cache, tmp_path / "out", student=(f"copy={teacher}",), control=(f"random={other}",)))
    assert "did not help" not in found.verdict.sentence
    copy = next(line for line in found.quality if line.name == "copy")
    assert copy.retention.value == 1
    assert (copy.retention.interval.low, copy.retention.interval.high) == (1, 1)
    assert copy.difference.value == 0
    assert (
        copy.metrics["accuracy"].value == found.teachers[0].metrics["accuracy"].value == pytest.approx(0.75, abs=0.02)
    )
    for name, value in found.teachers[0].metrics.items():
        assert copy.metrics[name].value == pytest.approx(value.value, abs=1e-6), name
    close = found.closeness[0]
    assert close.agreement.value == close.on_right == close.on_errors == 1
    assert close.agreement.interval.low < 0.95  # 30 agreeing rows leave uncertainty
    assert close.mended == 0
    assert close.kl.value == pytest.approx(0, abs=1e-6)
    assert close.js.value == pytest.approx(0, abs=1e-6)
    assert found.verdict.answer == "yes"
    assert "copy keeps 100.0% (100.0% to 100.0%) of its teacher's accuracy" in found.verdict.sentence
    tests = [c for c in found.comparisons if c.second == "teacher"]
    assert {c.metric: (c.p_value, c.p_adjusted) for c in tests} == {"accuracy": (1, 1), "loss": (1, 1)}
    assert all(share.share.value == pytest.approx(1) for share in found.gap_shares if share.share is not None)


@pytest.mark.full
def test_a_random_student_is_at_chance(tmp_path, bert_tokenizer, save_teacher):
    """Labels, teacher and student are independent of each other."""
    rng = np.random.default_rng(0)
    rows = [
        softlabel.LabelledRow(
            rng.integers(5, 100, 8),
            label=int(rng.integers(3)),
            logits=torch.from_numpy(rng.normal(size=(1, 3))),
        )
        for _ in range(600)
    ]
    cache = softlabel.write_cache(
        rows,
        tmp_path / "c",
        task="sequence-classification",
        tokenizer=bert_tokenizer,
        encoding=Full(),
        teacher="dice",
        label_names=LABELS,
    )
    other = save_teacher(classifier(bert_tokenizer, seed=5), bert_tokenizer, "random")
    found = report(configured(cache, tmp_path / "out", student=(f"random={other}",), split="train"))
    line = found.quality[0]
    for chance in (line.metrics["accuracy"], found.teachers[0].metrics["accuracy"], found.closeness[0].agreement):
        assert chance.interval.low < 1 / 3 < chance.interval.high
        assert chance.interval.high - chance.interval.low < 0.1
    assert line.retention.interval.low < 1 < line.retention.interval.high
    assert found.break_even == ()  # the capture time is unknown


@pytest.mark.usefixtures("plain_pictures")
def test_a_student_that_is_not_as_good(setting, tmp_path):
    cache, teacher, other = setting
    found = report(configured(cache, tmp_path / "out", student=(f"random={other}",), control=(f"copy={teacher}",)))
    assert found.verdict.answer == "no"
    assert found.verdict.sentence.startswith("No: random keeps")
    assert "copy keeps 100.0%" in found.verdict.controls
    assert "But the soft labels did not help: controls are better (copy 76.7%); check the teacher." in (
        found.verdict.sentence
    )
    # The control is the teacher: there is no gap to close.
    assert all(share.share is None for share in found.gap_shares)
    assert found.verdict.gap == ""


@pytest.mark.usefixtures("plain_pictures")
def test_figures_are_those_of_other_libraries(setting, tmp_path, bert_tokenizer):
    cache, _, other = setting
    found = report(configured(cache, tmp_path / "out", student=(f"s={other}",)))
    student = classifier(bert_tokenizer, seed=5)
    p, q, labels = [], [], []
    for row in cache.dataset("test"):
        with torch.inference_mode():
            logits = student(input_ids=torch.from_numpy(row.example.input_ids.astype(np.int64))[None]).logits[0]
        p.append(torch.softmax(logits.double(), -1).numpy())
        q.append(torch.softmax(row.soft.top_logprobs.double(), -1).numpy())
        labels.append(row.example.label)
    p, q, labels = np.array(p), np.array(q), np.array(labels)
    close = found.closeness[0]
    ours, theirs = p.argmax(1), q.argmax(1)
    assert close.js.value == pytest.approx(np.mean(jensenshannon(p, q, axis=1) ** 2), rel=1e-4)
    assert close.kl.value == pytest.approx(np.mean((q * np.log(q / p)).sum(1)), rel=1e-4)
    wrong = theirs != labels
    assert close.on_errors == pytest.approx((ours == theirs)[wrong].mean())
    assert close.on_right == pytest.approx((ours == theirs)[~wrong].mean())
    assert close.mended == pytest.approx((ours == labels)[wrong].mean())
    line = next(item for item in found.calibrations if item.name == "s")
    ece = multiclass_calibration_error(torch.from_numpy(p), torch.from_numpy(labels), num_classes=3, n_bins=15)
    assert line.ece == pytest.approx(float(ece), abs=1e-6)
    assert line.nll.value == pytest.approx(-np.log(p[np.arange(30), labels]).mean(), rel=1e-5)
    assert line.brier.value == pytest.approx(((p - np.eye(3)[labels]) ** 2).sum(1).mean(), rel=1e-5)
    for item in found.slices:
        of_class = labels == LABELS.index(item.name)
        assert item.positions == of_class.sum()
        assert item.models[0].agreement == pytest.approx((ours == theirs)[of_class].mean())
        assert item.models[0].kl == pytest.approx((q * np.log(q / p)).sum(1)[of_class].mean(), rel=1e-4)
    farthest = np.argsort(-(q * np.log(q / p)).sum(1))[:3]
    assert [example.source_row for example in found.examples] == farthest.tolist()


@pytest.mark.usefixtures("plain_pictures")
def test_temperature_scaling_keeps_predictions_and_lowers_the_loss(setting, tmp_path, bert_tokenizer, save_teacher):
    cache, _, _ = setting
    sure = classifier(bert_tokenizer)  # the teacher, but over-confident
    with torch.no_grad():
        sure.classifier.weight.mul_(20)
    path = save_teacher(sure, bert_tokenizer, "sure")
    found = report(configured(cache, tmp_path / "out", student=(f"s={path}",), split="train"))
    plain, scaled = found.quality
    assert scaled.scaled
    assert scaled.metrics["accuracy"].value == plain.metrics["accuracy"].value
    assert scaled.metrics["loss"].value < plain.metrics["loss"].value
    assert found.calibrations[2].temperature > 1.5
    assert "crosswise" in found.calibration


def trained(cache, start: str, output: Path, **settings) -> str:
    config = {"max_steps": 4, "batch_size": 8, "training": {"logging_steps": 1}, "learning_rate": 1e-3, **settings}
    train(TrainStudentConfig(cache=str(cache.root), student=start, output=str(output), **config))
    return str(output)


@pytest.mark.full
def test_seeds_determinants_curves_and_costs_of_training(setting, tmp_path):
    cache, _, start = setting
    students = [f"a={trained(cache, start, tmp_path / f'a{seed}', seed=seed)}" for seed in (1, 0)]
    students.append(f"b={trained(cache, start, tmp_path / 'b', temperature=4.0, divergence='reverse-kl')}")
    labels = [f"labels={trained(cache, start, tmp_path / f'l{i}', seed=i, soft_weight=0)}" for i in (0, 1)]
    found = report(configured(cache, tmp_path / "out", student=tuple(students), control=tuple(labels)))
    assert (tmp_path / "a0" / "trainer_state.json").is_file()
    a, _, control = found.models
    assert [run.seed for run in a.runs] == [0, 1]
    assert a.made_by == "0.9 forward-kl at T = 2 + 0.1 hard labels"
    assert control.made_by == "0.1 hard labels"
    line = next(item for item in found.quality if item.name == "a")
    each = [np.nan, np.nan]
    for i, run in enumerate(("a0", "a1")):
        each[i] = softlabel.evaluate(cache, {"s": str(tmp_path / run)}).students[0].metrics["accuracy"]
    assert line.metrics["accuracy"].value == pytest.approx(np.mean(each))
    assert line.num_seeds == 2
    assert line.retention.both is not None
    assert "over rows and" in found.verdict.sentence or found.verdict.student == "b"
    # 90 training rows, 18 without a label: 4 steps of 8 rows.
    assert a.runs[0].passes == pytest.approx(32 / 90)
    assert control.runs[0].passes == pytest.approx(32 / 72)
    assert [entry["step"] for entry in a.runs[0].history][:4] == [1, 2, 3, 4]
    assert {"soft_loss", "hard_loss", "learning_rate"} <= set(a.runs[0].history[0])
    even = found.break_even[0]
    assert even.passes == pytest.approx(even.capture_seconds / even.pass_seconds)
    assert even.passes >= 1
    assert even.passes_made == pytest.approx(3 * 32 / 90)  # the control does not use the teacher
    factors = {item.factor: [level.value for level in item.levels] for item in found.determinants}
    assert factors == {"temperature": ["2", "4"], "divergence": ["forward-kl", "reverse-kl"]}
    means = next(item for item in found.determinants if item.factor == "temperature").levels
    assert means[0].mean == pytest.approx(np.mean(each))
    pair = next(c for c in found.comparisons if (c.first, c.second, c.metric) == ("a", "labels", "loss"))
    assert pair.test == "sign flips over rows"
    assert pair.p_seeds is not None
    out = tmp_path / "out"
    text = (out / "report.md").read_text()
    assert "Does the balance of the hyperparameters decide? By temperature" in text
    assert (
        "all students are alike in it: Does the student's architecture decide? Does the quality of the teacher decide?"
        in text
    )
    assert {path.name for path in out.iterdir()} == {
        "report.html",
        "report.md",
        "report.json",
        *(f"{name}.png" for name in ("quality", "fidelity", "reliability", "pareto", "training", "determinants")),
    }
    assert (out / "report.json").read_text() == dump(found)
    assert parse(Report, out / "report.json").verdict == found.verdict


@pytest.mark.full
def test_students_of_two_teachers_on_the_same_rows(setting, tmp_path, bert_tokenizer, topics, save_teacher):
    cache, teacher, start = setting
    worse = classifier(bert_tokenizer, seed=9)
    path = save_teacher(worse, bert_tokenizer, "worse")
    rows = taught(topics, classifier(bert_tokenizer), bert_tokenizer)
    second = softlabel.cache_logits(str(path), rows, tmp_path / "worse-cache", task="sequence-classification")
    of_second = trained(second, start, tmp_path / "s2")
    config = configured(cache, tmp_path / "out", student=(f"good={teacher}", f"poor={of_second}"))
    found = report(dataclasses.replace(config, cache=(str(cache.root), str(second.root))))
    assert [line.name for line in found.teachers] == ["teacher", "teacher worse-cache"]
    assert [line.teacher for line in found.quality] == ["teacher", "teacher"] + ["teacher worse-cache"] * 2
    poor = softlabel.evaluate(second, {"s": of_second})
    line = next(item for item in found.quality if item.name == "poor")
    assert line.retention.value == pytest.approx(poor.students[0].retention)
    assert found.closeness[1].agreement.value == pytest.approx(poor.students[0].agreement)
    by_teacher = next(item for item in found.determinants if item.factor == "teacher")
    assert len(by_teacher.levels) == 2
    other_rows = softlabel.cache_logits(
        str(path), topics, tmp_path / "others", task="sequence-classification", overwrite=True
    )
    with pytest.raises(ContractError, match="other rows or labels"):
        report(dataclasses.replace(config, cache=(str(cache.root), str(other_rows.root))))
    with pytest.raises(MisuseError, match="given twice"):
        report(dataclasses.replace(config, cache=(str(cache.root), str(cache.root))))


@pytest.mark.usefixtures("plain_pictures")
def test_the_headline_is_chosen_on_the_validation_split(tmp_path, bert_tokenizer, topics, save_teacher):
    """The verdict is about the best student on validation, although it is worse on test."""
    teacher = classifier(bert_tokenizer)
    path = str(save_teacher(teacher, bert_tokenizer))
    other = str(save_teacher(classifier(bert_tokenizer, seed=5), bert_tokenizer, "other"))
    rows = taught(topics, teacher, bert_tokenizer)
    against = taught(topics, classifier(bert_tokenizer, seed=5), bert_tokenizer)
    splits = DatasetDict({"train": rows["train"], "validation": against["test"], "test": rows["test"]})
    cache = softlabel.cache_logits(path, splits, tmp_path / "cache", task="sequence-classification")
    found = report(configured(cache, tmp_path / "out", student=(f"copy={path}", f"other={other}")))
    assert found.verdict.student == "other"
    assert found.verdict.chosen == "the best of 2 students on the split validation"
    assert found.calibration == "fitted on the split validation"
    crosswise = configured(cache, tmp_path / "out", student=(f"copy={path}",), calibration_split="train")
    assert report(crosswise).calibration == "fitted on the split train"
    with pytest.raises(CacheError, match="no split 'dev'"):
        report(dataclasses.replace(crosswise, calibration_split="dev"))


@pytest.mark.parametrize("encoding", [*in_full(Full(), TopK(8)), Sampled(8.0)], ids=lambda e: e.kind)
def test_language_models(tmp_path, lm_tokenizer, documents, save_teacher, encoding):
    teacher = tiny_model("llama", len(lm_tokenizer), spread=4.0)
    path = str(save_teacher(teacher, lm_tokenizer))
    other = str(save_teacher(tiny_model("llama", len(lm_tokenizer), seed=4, spread=4.0), lm_tokenizer, "other"))
    cache = softlabel.cache_logits(path, documents, tmp_path / "c", task="causal-lm", max_length=32, encoding=encoding)
    found = report(configured(cache, tmp_path / "out", student=(f"copy={path}",), control=(f"other={other}",)))
    assert found.main_metric == "loss"
    copy = next(line for line in found.quality if line.name == "copy")
    assert copy.retention.value == pytest.approx(1, rel=1e-3)
    assert found.closeness[0].agreement.value > 0.99
    known = softlabel.evaluate(cache, {"other": other}).students[0]
    control = next(line for line in found.quality if line.name == "other")
    assert control.metrics["loss"].value == pytest.approx(known.metrics["loss"])
    assert control.metrics["perplexity"].value == pytest.approx(known.metrics["perplexity"])
    assert found.closeness[1].kl.value == pytest.approx(known.kl, rel=1e-6)
    sampled = encoding.kind == "sampled"
    assert (found.closeness[1].js is None) == sampled
    assert ("left out" in found.divergence_note) == sampled
    assert all((line.kl is None) == sampled for item in found.slices for line in item.models)
    assert "next token" in found.slice_kind
    assert sum(item.positions for item in found.slices) == found.positions
    counts = np.bincount(
        np.concatenate([row.example.input_ids for row in cache.dataset("train")]), minlength=len(lm_tokenizer)
    )
    times = counts[observe_teacher(cache, get_task("causal-lm"), "test").predictions.labels]
    expected = {"unseen": (times == 0).sum(), "10 to 99 times": ((times >= 10) & (times < 100)).sum()}
    for item in found.slices:
        assert item.positions == expected.get(item.name, item.positions)
    if encoding.kind == "full":  # the copy has the teacher's Brier score
        assert copy.metrics["brier"].value == pytest.approx(found.teachers[0].metrics["brier"].value, rel=1e-3)
    else:
        assert "brier" not in found.teachers[0].metrics


@pytest.mark.usefixtures("plain_pictures")
def test_texts_are_escaped(tmp_path, bert_tokenizer, topics, save_teacher):
    planted = "<script>alert(1)</script> <img src=x onerror=alert(2)> | `a` **b** the cat"
    teacher = classifier(bert_tokenizer)
    path = str(save_teacher(teacher, bert_tokenizer))
    rows = taught(topics, teacher, bert_tokenizer)
    rows["test"] = Dataset.from_dict({"text": [planted] * 12, "label": [LABELS[i % 3] for i in range(12)]})
    cache = softlabel.cache_logits(path, rows, tmp_path / "c", task="sequence-classification")
    report(configured(cache, tmp_path / "out", student=(f"<b>x</b>={path}",)))
    page, text = ((tmp_path / "out" / name).read_text() for name in ("report.html", "report.md"))
    for what in (page, text):
        assert "<script" not in what
        assert "<img src=x" not in what
        assert "<b>x" not in what
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert r"\| \`a\` \*\*b\*\*" in text
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.usefixtures("plain_pictures")
def test_no_texts_where_the_cache_has_none(tmp_path, bert_tokenizer, topics, save_teacher):
    path = str(save_teacher(classifier(bert_tokenizer), bert_tokenizer))
    cache = softlabel.cache_logits(path, topics, tmp_path / "c", task="sequence-classification", store_text=False)
    found = report(configured(cache, tmp_path / "out", student=(f"copy={path}",)))
    assert [example.text for example in found.examples] == [None] * 3
    assert "Texts are not shown" in (tmp_path / "out" / "report.html").read_text()
    assert not any(text in (tmp_path / "out" / "report.html").read_text() for text in topics["test"]["text"])
    assert report(configured(cache, tmp_path / "out", student=(f"copy={path}",), examples=0)).examples == ()


def test_what_is_refused(setting, tmp_path):
    cache, teacher, other = setting
    out = tmp_path / "out"
    for settings, said in (
        ({"student": (f"a={teacher}",), "control": (f"a={other}",)}, "is a student already"),
        ({"student": (f"a={teacher}", f"a={teacher}")}, "given twice"),
        ({"student": (f"teacher={other}",)}, "the name teacher is the teacher's"),
    ):
        with pytest.raises(MisuseError, match=said):
            report(configured(cache, out, **settings))
    for settings, said in (
        ({"student": ()}, "--student"),
        ({"cache": ()}, "--cache"),
        ({"calibration_split": "test"}, "flatter"),
        ({"resamples": 10}, "--resamples"),
        ({"rounds": -1}, "--rounds"),
        ({"watts": 0.0}, "--watts"),
    ):
        with pytest.raises(MisuseError, match=said):
            ReportConfig(**{"cache": "c", "student": "s", "output": "o", **settings})
    with pytest.raises(CacheError, match="no split 'dev'"):
        report(configured(cache, out, student=(other,), split="dev"))
    assert not out.exists()


def test_a_split_without_labels(tmp_path, setting, topics):
    _, teacher, other = setting
    cache = softlabel.cache_logits(
        teacher, topics["train"].remove_columns("label"), tmp_path / "c", task="sequence-classification"
    )
    with pytest.raises(CacheError, match="no hard label to report against"):
        report(configured(cache, tmp_path / "out", student=(other,), split="train"))


@pytest.mark.full
def test_of_many_students_one_meets_the_controls(setting, tmp_path):
    """Each student is compared with its teacher, the first also with controls and the others."""
    cache, teacher, other = setting
    names = tuple(f"s{i}={tmp_path / f's{i}'}" for i in range(5))
    for name in names:
        Path(name.partition("=")[2]).symlink_to(other)
    found = report(configured(cache, tmp_path / "out", student=names, control=(f"c={teacher}",)))
    assert {(c.first, c.second) for c in found.comparisons if c.metric == "accuracy"} == {
        *((f"s{i}", "teacher") for i in range(5)),
        ("s0", "c"),
        *(("s0", f"s{i}") for i in range(1, 5)),
    }
    assert ("s0", "c, scaled") in {(c.first, c.second) for c in found.comparisons if c.metric == "loss"}
    assert all(c.p_adjusted >= c.p_value for c in found.comparisons)


def test_the_command(setting, tmp_path):
    cache, teacher, other = setting
    args = ["report", "--cache", str(cache.root), "--student", f"s={other}", "--control", f"c={teacher}"]
    args += ["--rounds", "0", "--output", str(tmp_path / "out"), "--resamples", "200"]
    done = CliRunner().invoke(main, args, catch_exceptions=False)
    assert done.exit_code == 0
    assert " ".join(done.stdout.split()).startswith("No: s keeps")
    assert "s, scaled" in done.stdout
    assert "report.html" in done.stdout
    refused = CliRunner().invoke(main, args, catch_exceptions=False)
    assert refused.exit_code == 2
    assert f"{tmp_path / 'out'}: holds a report (report.json, report.html, report.md)" in refused.stderr
    assert "--overwrite" in refused.stderr
    printed = CliRunner().invoke(main, [*args, "--json", "--overwrite"], catch_exceptions=False).stdout
    assert json.loads(printed)["verdict"]["answer"] == "no"
    assert CliRunner().invoke(main, [*args, "--resamples", "1"]).exit_code == 2


def test_without_matplotlib(setting, tmp_path, monkeypatch):
    cache, _, other = setting
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MisuseError, match=r"soft-label-pipeline\[report\]"):
        report(configured(cache, tmp_path / "out", student=(f"s={other}",)))


def test_json_has_no_nan(setting, tmp_path):
    cache, teacher, _ = setting
    report(configured(cache, tmp_path / "out", student=(f"copy={teacher}",)))
    text = (tmp_path / "out" / "report.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert not math.isnan(json.loads(text)["quality"][0]["retention"]["value"])
