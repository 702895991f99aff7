"""--dry-run runs a command's checks, prints its inputs and outputs, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

import pipeline as softlabel
from pipeline import config as cfg
from pipeline.cli import main
from pipeline.cli.commands import OUTLINES
from tests.conftest import tiny_model
from tests.support.once import once

LONG = {
    *("train-teacher", "generate", "cache-logits", "train-student", "evaluate", "sweep"),
    *("verify", "audit", "report"),
    *("merge", "filter", "convert", "import", "push", "pull"),
}
CAPTURE = ["--task", "sequence-classification", "--dataset", "data", "--teacher", "teacher"]


@pytest.fixture
def project(tmp_path, bert_tokenizer, topics, monkeypatch):
    """Create data, a pretrained model, a teacher, a cache and a student."""

    def make(folder: Path) -> None:
        (folder / "data").mkdir()
        for split, rows in topics.items():
            rows.to_json(folder / "data" / f"{split}.jsonl")
        teacher = tiny_model("bert", len(bert_tokenizer), num_labels=3, spread=4.0)
        names = dict(enumerate(sorted(set(topics["test"]["label"]))))
        teacher.config.id2label, teacher.config.label2id = names, {name: i for i, name in names.items()}
        models = {"pretrained": teacher.bert, "teacher": teacher}
        models["student"] = tiny_model("bert", len(bert_tokenizer), num_labels=3, seed=5)
        models["student"].config.id2label = names
        models["student"].config.label2id = teacher.config.label2id
        for name, model in models.items():
            model.save_pretrained(folder / name)
            bert_tokenizer.save_pretrained(folder / name)
        data = topics
        data["validation"] = topics["test"]
        softlabel.cache_logits(str(folder / "teacher"), data, folder / "cache", task="sequence-classification")

    once(__name__, make, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every file and directory, the folder included, with size and modification time."""
    return {
        str(path.relative_to(folder)): (0 if path.is_dir() else path.stat().st_size, path.stat().st_mtime_ns)
        for path in (folder, *folder.rglob("*"))
    }


def call(*args: str):
    return CliRunner().invoke(main, list(args))


def lines_of(result) -> dict[str, str]:
    assert result.exit_code == 0, result.output
    first, *lines = result.stdout.splitlines()
    assert first.endswith(": dry run, no output is written")
    return {line.split("  ")[1]: line.split("  ", 2)[2].strip() for line in lines}


def test_every_command_that_works_long_has_one():
    assert set(OUTLINES) == LONG
    assert "--dry-run" in call("run", "--help").output
    for name in LONG:
        assert "dry_run" not in {field.name for field in cfg.cli_fields(cfg.SECTIONS[name])}  # not a setting of a run


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["verify", "--cache", "cache"], {"reads": "rows are decoded", "writes": "nothing"}),
        (["verify", "--cache", "cache", "--quick"], {"reads": "nothing is decoded"}),
        (
            ["audit", "--cache", "cache", "--teacher", "teacher", "--rows", "8"],
            {"reads": "cache: 8 rows", "teacher": "teacher: ", "writes": "a report in cache/reports"},
        ),
        (
            ["report", "--cache", "cache", "--student", "student", "--output", "new"],
            {"reads": "cache: test, 30 rows", "student": "parameters; student", "writes": "in new"},
        ),
        (
            ["cache-logits", *CAPTURE, "--output", "new", "--rows-per-shard", "50"],
            {
                "reads": "data: train 90 rows, test 30 rows",
                "encoding": "full over 3 classes",
                "writes": "new: 3 shards of up to 50 rows",
                "tokens": "in 120 rows",
                "time": "of the teacher in one process",
            },
        ),
        (
            [
                *("train-teacher", "--task", "sequence-classification", "--dataset", "data", "--model", "pretrained"),
                *("--output", "deep/new", "--epochs", "2"),
            ],
            {"reads": "train, 72 labelled rows", "steps": "10; 5 an epoch", "writes": "deep/new: about"},
        ),
        (
            [
                "train-student",
                "--cache",
                "cache",
                "--student",
                "student",
                "--output",
                "deep/new",
                "--batch-size",
                "8",
                "--epochs",
                "3",
            ],
            {
                "splits": "train",
                "reads": "cache: 90 rows an epoch, full",
                "evaluation": "validation, 30 rows",
                "loss": "T = 2",
                "steps": "36; 12 an epoch",
                "batch": "8 rows a step",
            },
        ),
        (
            ["evaluate", "--cache", "cache", "--student", "s=student", "--output", "new"],
            {"reads": "cache: test, 30 rows, 3 classes", "s": "parameters, on", "writes": "new/evaluation.json"},
        ),
        (
            ["sweep", "--cache", "cache", "--student", "student", "--no-controls", "--output", "new"],
            {"student-0.5-0.5-seed0": "to be trained", "writes": "new: 1 of 1 students"},
        ),
        (
            ["merge", "--cache", "cache", "--cache", "cache", "--output", "new"],
            {"rows": "300 in train, test, validation"},
        ),
        (["filter", "--cache", "cache", "--where", "label = 1", "--output", "new"], {"writes": "at most 150 rows"}),
        (
            ["convert", "--cache", "cache", "--encoding", "top-k", "--top-k", "2", "--output", "new"],
            {"encoding": "top-k 2", "writes": "new: 3 shards, 0 of them there already"},
        ),
        (
            ["pull", "--from", "cache", "--output", "new", "--split", "test"],
            {"rows": "30 in test", "fetches": "0 B are there"},
        ),
        (
            ["push", "--cache", "cache", "--to", "file:///tmp/none/there", "--license", "mit"],
            {"sends": "0 B are there"},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_would_be_done_is_printed_and_nothing_is_written(project, args, expected):
    before = listing(project)
    found = lines_of(call(*args, "--dry-run"))
    assert listing(project) == before
    for what, said in expected.items():
        assert said in found[what], (what, found[what])


@pytest.mark.parametrize(
    "args",
    [
        ["cache-logits", *CAPTURE, "--output", "new", "--encoding", "top-k"],
        ["cache-logits", *CAPTURE, "--output", "new", "--text-column", "texts"],
        ["cache-logits", *CAPTURE, "--output", "cache", "--seed", "1", "--encoding", "top-k", "--top-k", "2"],
        ["cache-logits", *CAPTURE, "--output", "data"],
        ["train-student", "--cache", "cache", "--student", "student", "--output", "new", "--split", "training"],
        ["train-student", "--cache", "cache", "--student", "student", "--output", "student"],
        ["train-student", "--cache", "cache", "--student", "teacher", "--output", "new", "--report-to", "nothing"],
        ["evaluate", "--cache", "cache", "--student", "student", "--split", "dev"],
        ["filter", "--cache", "cache", "--where", "colour = 1", "--output", "new"],
        ["convert", "--cache", "cache", "--encoding", "full", "--output", "cache"],
        ["pull", "--from", "cache", "--output", "data"],
        ["pull", "--from", "cache", "--output", "new", "--split", "dev"],
    ],
    ids=lambda args: " ".join([args[0], *args[-2:]]),
)
def test_what_is_wrong_fails_as_the_command_does(project, args):
    before = listing(project)
    planned = call(*args, "--dry-run")
    assert listing(project) == before
    real = call(*args)
    assert planned.exit_code == real.exit_code != 0
    assert planned.stderr.splitlines()[-1] == real.stderr.splitlines()[-1]


def test_an_overwritten_cache_counts_as_gone_and_stays(project):
    args = ["cache-logits", *CAPTURE, "--output", "made", "--rows-per-shard", "50"]
    assert call(*args).exit_code == 0
    before = listing(project)
    assert "3 are there already; about 0 B" in lines_of(call(*args, "--dry-run"))["writes"]
    again = lines_of(call(*args, "--overwrite", "--encoding", "top-k", "--top-k", "2", "--dry-run"))
    assert "already" not in again["writes"]
    assert listing(project) == before


def test_a_run_says_which_stages_run_and_why(project):
    student = {"cache": "r/cache", "student": "student", "output": "r/student", "max_steps": 2}
    config = {
        "task": "sequence-classification",
        "data": {"dataset": "data"},
        "cache-logits": {"teacher": "teacher", "output": "r/cache"},
        "train-student": student,
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    before = listing(project)
    result = call("run", "run.yaml", "--dry-run")
    assert "runs: is not there" in result.stdout
    assert "runs: reads r/cache, which a stage before makes" in result.stdout
    assert listing(project) == before
    assert call("run", "run.yaml", "--through", "cache-logits").exit_code == 0
    before = listing(project)
    result = call("run", "run.yaml", "--dry-run")
    assert "is skipped: up to date" in result.stdout
    assert "90 rows an epoch" in result.stdout  # its inputs exist now, so the stage is checked
    assert listing(project) == before


def test_responses_are_looked_at_and_not_imported(project, lm_tokenizer):
    lm_tokenizer.save_pretrained("tokenizer")
    ids = lm_tokenizer("the cat sat on the mat")["input_ids"]
    entry = [None, *({str(token): {"logprob": -0.1}} for token in ids[1:])]
    row = {"prompt": "the cat", "prompt_token_ids": ids, "prompt_logprobs": entry}
    Path("responses.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(3)))
    args = ["import", "--input", "responses.jsonl", "--tokenizer", "tokenizer", "--teacher", "t", "--top-k", "1"]
    args += ["--position-zero", "empty", "--output", "new"]
    before = listing(project)
    found = lines_of(call(*args, "--dry-run"))
    assert listing(project) == before
    assert found["rows"].startswith("3 of the first 3")
    assert call(*args).exit_code == 0
    before = listing(project)
    assert call(*args, "--dry-run").exit_code == 2
    assert listing(project) == before
