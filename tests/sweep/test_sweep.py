"""Sweeps train many students in one process.

Each student equals that of `train-student` and is trained once; the choice uses another split than
the report.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

import pipeline as softlabel
from pipeline.cli import main
from pipeline.config import SweepConfig
from pipeline.errors import CacheError, MisuseError
from pipeline.records import TopK
from pipeline.sweep import format_leaderboard, report, run
from pipeline.sweep.grid import plan
from pipeline.training.trainer import DistillationTrainer
from tests.conftest import tiny_model
from tests.support.once import once
from tests.support.profile import plain_pictures  # noqa: F401 - a fixture
from tests.training.test_train import NAMES
from tests.training.test_train import config as train_config

pytestmark = pytest.mark.usefixtures("plain_pictures")


@pytest.fixture
def teacher(bert_tokenizer, save_teacher):
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3, spread=4.0)
    model.config.id2label, model.config.label2id = NAMES, {name: i for i, name in NAMES.items()}
    return save_teacher(model, bert_tokenizer)


@pytest.fixture
def cache(tmp_path, teacher, topics):
    topics["validation"] = topics["test"]
    topics["test"] = topics["train"].select(range(9))

    def make(folder: Path) -> None:
        softlabel.cache_logits(str(teacher), topics, folder / "cache", task="sequence-classification")

    once(__name__, make, tmp_path)
    return softlabel.Cache.open(tmp_path / "cache")


def sweep(cache, teacher, output: Path, **settings) -> SweepConfig:
    settings = {
        "shape": ("1x16x2",),
        "temperature": (1.0, 4.0),
        "max_steps": 4,
        "learning_rate": 1e-2,
        "batch_size": 8,
        "controls": False,
        **settings,
    }
    return SweepConfig(cache=(str(cache.root),), teacher=str(teacher), output=str(output), **settings)


@pytest.fixture
def trained(monkeypatch):
    """Record what is trained: (name, whether it was resumed)."""
    module = importlib.import_module("pipeline.sweep.run")  # `pipeline.sweep` has a function of that name
    plain, calls = module.train, []

    def watch(config, cache):
        calls.append((Path(config.output).name, config.resume))
        return plain(config, cache)

    monkeypatch.setattr(module, "train", watch)
    return calls


def test_the_grid_has_every_combination_once(tmp_path):
    settings = {
        "cache": ("a=c/a", "b=c/b"),
        "teacher": "t",
        "shape": ("1x16x2", "2x16x2"),
        "layers": ("0,3",),
        "student": ("own=some/where", "org/name"),
        "temperature": (1.0, 2.0),
        "weights": ("0.1/0.9", "0.5/0.5", "1/0", "3/0"),
        "divergence": ("forward-kl", "logit-mse"),
        "seed": (0, 1),
        "output": str(tmp_path),
    }
    assert len(SweepConfig(**settings).losses) == 2 * 3 + 1
    runs = plan(SweepConfig(**settings), ["a", "b"])
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    # 5 students: on each cache 2 weights x (forward KL at 2 temperatures, logit MSE once), the
    # teacher's labels, and on one cache the data's labels
    assert len(runs) == 2 * 5 * (2 * (2 * 3 + 1) + 1)
    assert sum(run.role == "control" for run in runs) == 2 * 5 * 3
    assert {run.cache for run in runs if run.group.endswith("-labels-a") and not run.teacher_labels} == {"a"}
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert "own-0.1-0.9-T2-a-seed0" in names
    assert "layers-0-3-0.5-0.5-logit-mse-b-seed1" in names
    assert "name-teacher-labels-b-seed0" in names
    alone = plan(SweepConfig(**{**settings, "cache": ("c/a",), "controls": False, "weights": ("0.1/0.9",)}), ["a"])
    assert {run.role for run in alone} == {"student"}
    assert all("-a-" not in run.name for run in alone)


def test_each_student_is_the_one_that_train_student_makes(tmp_path, cache, teacher, trained):
    config = sweep(cache, teacher, tmp_path / "sweep", seed=(0, 3))
    found = run(config)
    assert not found.failed
    assert len(trained) == 4
    softlabel.init_student(teacher, tmp_path / "init", config=softlabel.Shape(1, 16, 2), seed=3)
    weights = {"hard_weight": 0.5, "soft_weight": 0.5}
    shown = {"temperature": 4.0, "max_steps": 4, "learning_rate": 1e-2, "seed": 3, **weights}
    by_hand = train_config(cache, tmp_path / "init", tmp_path / "hand", **shown)
    from pipeline.training.run import run as train

    expected = train(by_hand)
    chosen = next(r for r in found.runs if r.seed == 3 and r.loss.temperature == 4.0)
    assert chosen.directory == "runs/1x16x2-0.5-0.5-T4-seed3"
    one, other = (
        load_file(path / "model.safetensors") for path in (tmp_path / "hand", tmp_path / "sweep" / chosen.directory)
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert chosen.result.metrics == expected.metrics
    assert not list((tmp_path / "sweep").rglob("checkpoint-*"))


def test_seeds_are_grouped_and_the_best_is_chosen_on_validation(tmp_path, cache, teacher):
    config = sweep(cache, teacher, tmp_path / "sweep", seed=(0, 1), max_steps=12, controls=True)
    found = run(config)
    assert (found.eval_split, found.chosen_by, found.higher_is_better) == ("validation", "accuracy", True)
    assert [group.seeds for group in found.groups] == [(0, 1)] * 4
    for group in found.groups:
        paths = [tmp_path / "sweep" / r.directory for r in found.runs if r.group == group.name]
        lines = softlabel.evaluate(cache, {str(i): p for i, p in enumerate(paths)}, split="validation").students
        assert group.metrics["accuracy"] == pytest.approx(np.mean([line.metrics["accuracy"] for line in lines]))
        assert group.metrics["nll"] == pytest.approx(np.mean([line.metrics["loss"] for line in lines]), rel=1e-4)
        assert group.range.low == min(line.metrics["accuracy"] for line in lines)
        assert group.range.high == max(line.metrics["accuracy"] for line in lines)
    order = [(-group.metrics["accuracy"], group.metrics["nll"]) for group in found.groups]
    assert order == sorted(order)
    students = [group for group in found.groups if group.role == "student"]
    assert found.best == students[0].name
    teacher_line = softlabel.evaluate(cache, {}, split="validation").teacher
    assert found.teachers == {"cache": teacher_line.metrics}
    text = format_leaderboard(found)
    assert "sweep of 4 students, 4 controls" in text
    assert (
        "chosen on the split validation, by the highest accuracy, the mean over seeds (a tie: by the lowest nll); never on test"
        in text
    )
    starred = [line for line in text.splitlines() if line.startswith("*")]
    assert len(starred) == 1
    assert found.best in starred[0]
    kept = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert kept["best"] == found.best
    assert kept["settings"]["temperature"] == [1.0, 4.0]
    assert len(kept["runs"]) == 8


def test_what_is_finished_is_not_trained_again(tmp_path, cache, teacher, trained):
    first = run(sweep(cache, teacher, tmp_path / "sweep"))
    assert len(trained) == 2
    again = run(sweep(cache, teacher, tmp_path / "sweep"))
    assert len(trained) == 2
    assert again == first
    run(sweep(cache, teacher, tmp_path / "sweep", temperature=(1.0, 4.0, 2.0)))  # trains only the new students
    assert [name for name, _ in trained[2:]] == ["1x16x2-0.5-0.5-T2-seed0"]
    run(sweep(cache, teacher, tmp_path / "sweep", temperature=(1.0,), max_steps=5))  # a changed setting
    assert trained[3:] == [("1x16x2-0.5-0.5-T1-seed0", False)]
    proof = tmp_path / "sweep" / "runs" / "1x16x2-0.5-0.5-T4-seed0" / "distillation.json"
    proof.write_text(proof.read_text().replace('"steps": 4', '"steps": 9'))  # replaced by another run since
    run(sweep(cache, teacher, tmp_path / "sweep", temperature=(4.0,)))
    assert len(trained) == 5


def test_another_cache_or_start_is_another_run(tmp_path, cache, teacher, trained, topics, bert_tokenizer, save_teacher):
    run(sweep(cache, teacher, tmp_path / "sweep", temperature=(1.0,)))
    (tmp_path / "other").mkdir()
    other = softlabel.cache_logits(
        str(teacher), topics, tmp_path / "other" / "cache", task="sequence-classification", encoding=TopK(2)
    )
    run(sweep(other, teacher, tmp_path / "sweep", temperature=(1.0,)))
    assert len(trained) == 2
    wider = tiny_model("bert", len(bert_tokenizer), num_labels=3, intermediate_size=96)
    wider.config.id2label = NAMES
    run(sweep(other, save_teacher(wider, bert_tokenizer, "wider"), tmp_path / "sweep", temperature=(1.0,)))
    assert len(trained) == 3


def test_a_stopped_run_goes_on_where_it_was(tmp_path, cache, teacher, trained, monkeypatch):
    settings = {"temperature": (1.0,), "max_steps": 6, "training": {"save_steps": 2}}
    run(sweep(cache, teacher, tmp_path / "whole", **settings))
    plain, steps = DistillationTrainer.compute_loss, []

    def stop(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        run(sweep(cache, teacher, tmp_path / "stopped", **settings))
    steps.clear()
    monkeypatch.setattr(DistillationTrainer, "compute_loss", plain)
    found = run(sweep(cache, teacher, tmp_path / "stopped", **settings))
    assert trained[-1] == ("1x16x2-0.5-0.5-T1-seed0", True)
    assert found.runs[0].result.steps == 6
    one, other = (
        load_file(tmp_path / name / found.runs[0].directory / "model.safetensors") for name in ("whole", "stopped")
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_run_that_fails_is_recorded_and_the_others_go_on(tmp_path, cache, teacher, topics):
    narrow = softlabel.cache_logits(
        str(teacher), topics, tmp_path / "narrow", task="sequence-classification", encoding=TopK(2, (1.0, 2.0))
    )
    file = tmp_path / "sweep.yaml"
    section = {
        "cache": str(narrow.root),
        "teacher": str(teacher),
        "shape": "1x16x2",
        "temperature": [9, 1],
        "max_steps": 3,
        "controls": False,
        "output": str(tmp_path / "sweep"),
    }
    file.write_text(yaml.safe_dump({"sweep": section}))
    done = CliRunner().invoke(main, ["sweep", "--config", str(file)], catch_exceptions=False)
    assert done.exit_code == 1
    assert "1 of 2 runs failed, the first of them 1x16x2-0.5-0.5-T9-seed0: --temperature 9" in done.stderr
    assert "failed" in done.stdout
    assert "1x16x2-0.5-0.5-T1" in done.stdout.partition("parameters")[2]  # the report has the other student
    runs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]
    assert [(r["error"] is None, r["result"] is None) for r in runs] == [(False, True), (True, False)]


def test_a_sweep_of_which_every_run_diverges(tmp_path, cache, teacher):
    config = sweep(cache, teacher, tmp_path / "sweep", learning_rate=1e30, max_steps=30, training={"max_grad_norm": 0})
    found = run(config)
    assert [r.name for r in found.failed] == [r.name for r in found.runs]
    assert "expected a finite" in found.runs[0].error
    assert (found.best, found.chosen_by) == (None, None)
    assert report(config, found) == ""
    assert "failed" in format_leaderboard(found)


def test_running_out_of_memory_fails_one_run(tmp_path, cache, teacher, monkeypatch):
    plain = DistillationTrainer.compute_loss

    def exhausted(self, *args, **kwargs):
        if self.temperature == 4.0:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 GiB")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", exhausted)
    found = run(sweep(cache, teacher, tmp_path / "sweep"))
    assert [r.error for r in found.runs] == [None, "CUDA out of memory. Tried to allocate 1 GiB"]


def test_several_caches_answer_what_the_teacher_makes(tmp_path, cache, teacher, topics, bert_tokenizer, save_teacher):
    weak = tiny_model("bert", len(bert_tokenizer), num_labels=3, seed=8, spread=4.0)
    weak.config.id2label = NAMES
    other = softlabel.cache_logits(
        str(save_teacher(weak, bert_tokenizer, "weak-teacher")), topics, tmp_path / "w", task="sequence-classification"
    )
    config = SweepConfig(
        cache=(str(cache.root), f"weak={other.root}"),
        teacher=str(teacher),
        layers=("0,2",),
        max_steps=3,
        output=str(tmp_path / "sweep"),
    )
    found = run(config)
    names = {r.name for r in found.runs}
    assert names == {
        f"layers-0-2-{rest}-seed0"
        for rest in (
            "0.5-0.5-cache",
            "0.5-0.5-weak",
            "labels-cache",
            "teacher-labels-cache",
            "teacher-labels-weak",
        )
    }
    assert set(found.teachers) == {"cache", "weak"}
    assert "teacher of weak" in format_leaderboard(found)
    assert len({r.cache_id for r in found.runs}) == 2
    shown = report(config, found)
    page = (tmp_path / "sweep" / "report" / "report.md").read_text()
    for group in found.groups:
        assert group.name in shown
        assert group.name in page
    start = load_file(tmp_path / "sweep" / "starts" / "layers-0-2" / "model.safetensors")
    whole = load_file(teacher / "model.safetensors")
    name = "bert.encoder.layer.{}.output.dense.weight"
    assert torch.equal(start[name.format(1)], whole[name.format(2)])


def test_without_a_split_to_choose_on_nothing_is_chosen(tmp_path, teacher, topics):
    cache = softlabel.cache_logits(str(teacher), topics, tmp_path / "c", task="sequence-classification")
    found = run(sweep(cache, teacher, tmp_path / "sweep"))
    assert (found.eval_split, found.chosen_by, found.best) == (None, None, None)
    assert [group.name for group in found.groups] == [r.group for r in found.runs]  # in the order of the grid
    assert "no best student is chosen" in format_leaderboard(found)
    with pytest.raises(MisuseError, match="is the split that the best is chosen on"):
        run(sweep(cache, teacher, tmp_path / "sweep", eval_split="test"))
    for flag in ("split", "eval_split", "report_split"):
        with pytest.raises(CacheError, match=f"no split 'dev' for --{flag.replace('_', '-')}"):
            run(sweep(cache, teacher, tmp_path / "other", **{flag: "dev"}))
    assert not (tmp_path / "other").exists()


def test_without_labels_the_best_is_the_one_that_agrees_most(tmp_path, teacher, topics):
    topics["validation"] = topics["test"].remove_columns("label").add_column("label", [None] * 30)
    cache = softlabel.cache_logits(str(teacher), topics, tmp_path / "c", task="sequence-classification")
    found = run(sweep(cache, teacher, tmp_path / "sweep"))
    assert (found.chosen_by, found.teachers) == ("agreement", {})
    values = [group.metrics["agreement"] for group in found.groups]
    assert values == sorted(values, reverse=True)


def test_language_models_are_chosen_by_their_loss(tmp_path, lm_tokenizer, documents, save_teacher):
    path = save_teacher(tiny_model("llama", len(lm_tokenizer), spread=4.0), lm_tokenizer)
    documents["validation"] = documents["test"]
    cache = softlabel.cache_logits(str(path), documents, tmp_path / "c", task="causal-lm", max_length=32)
    config = sweep(cache, path, tmp_path / "sweep", shape=(), layers=("0", "0,3"), temperature=(), max_steps=6)
    found = run(config)
    assert (found.chosen_by, found.higher_is_better) == ("nll", False)
    values = [group.metrics["nll"] for group in found.groups]
    assert values == sorted(values)
    assert found.best == found.groups[0].name
    assert "by the lowest nll" in format_leaderboard(found)


@pytest.mark.full
def test_the_command_from_flags_and_as_json(tmp_path, cache, teacher):
    softlabel.init_student(teacher, tmp_path / "init", config=softlabel.Shape(1, 16, 2))
    args = ["--cache", str(cache.root), "--student", str(tmp_path / "init"), "--divergence", "reverse-kl"]
    args += ["--weights", "0/1", "--seed", "0", "--seed", "1", "--max-steps", "2", "--output", str(tmp_path / "sweep")]
    done = CliRunner().invoke(main, ["sweep", *args, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["groups"][0]["seeds"] == [0, 1]
    text = CliRunner().invoke(main, ["sweep", *args], catch_exceptions=False).stdout
    assert "init-0-1-reverse-kl" in text
    assert "split test" in text
    done = CliRunner().invoke(main, ["sweep", *args, "--divergence", "kl"])
    assert done.exit_code == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": ()}, "--cache: expected at least one"),
        ({"shape": ()}, "give a student"),
        ({"teacher": None}, "need --teacher"),
        ({"shape": (), "student": ("s",)}, "--teacher goes with"),
        ({"shape": ("2x128",)}, r"--shape: expected LAYERSxWIDTHxHEADS.*'2x128'"),
        ({"layers": ("0-2",)}, r"--layers: expected numbers.*'0-2'"),
        ({"weights": ("0.5",)}, r"--weights: expected HARD/SOFT.*'0.5'"),
        ({"weights": ("0/0",)}, "one of them above 0"),
        ({"weights": ()}, "--weights: expected at least one"),
        ({"temperature": (0.0,)}, "--temperature: expected above 0"),
        ({"batch_size": 0}, "--batch-size"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    plain = {"cache": ("c",), "teacher": "t", "shape": ("1x16x2",), "output": "o"}
    with pytest.raises(MisuseError, match=message):
        SweepConfig(**{**plain, **settings})


def test_two_of_one_name_and_several_ranks(tmp_path, cache, teacher, monkeypatch):
    with pytest.raises(MisuseError, match="--cache: two have the name cache"):
        run(SweepConfig(cache=("a/cache", "b/cache"), student=("s",), output="o"))
    with pytest.raises(MisuseError, match="two students have the name 1x16x2"):
        plan(SweepConfig(cache=("c",), student=("1x16x2=s",), shape=("1x16x2",), teacher="t", output="o"), ["c"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MisuseError, match="one process"):
        run(sweep(cache, teacher, tmp_path / "sweep"))
