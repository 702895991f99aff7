"""The command line: all stages on tiny models, and its answers to user errors."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.errors import MisuseError
from tests.conftest import tiny_model


@pytest.fixture
def project(tmp_path, bert_tokenizer, topics, save_teacher, monkeypatch):
    """Write data, a pretrained model and a configuration like the demo's."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for split, rows in topics.items():
        rows.to_json(f"data/{split}.jsonl")
    save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=2).bert, bert_tokenizer, "pretrained")
    student = {"cache": "runs/cache", "student": "runs/init", "max_steps": 3, "batch_size": 8}
    config = {
        "task": "sequence-classification",
        "data": {"dataset": "data"},
        "train-teacher": {"model": "pretrained", "output": "runs/teacher", "max_steps": 3},
        "cache-logits": {"teacher": "runs/teacher", "output": "runs/cache", "rows_per_shard": 50},
        "init-student": {
            "teacher": "runs/teacher",
            "output": "runs/init",
            "num_layers": 1,
            "hidden_size": 16,
            "num_heads": 2,
        },
        "train-student": [
            {**student, "output": "runs/a"},
            {**student, "output": "runs/b", "hard_labels": "teacher", "soft_weight": 0},
        ],
        "evaluate": {"cache": "runs/cache", "student": ["runs/a", "control=runs/b"], "output": "runs"},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return config


def call(*args: str):
    return CliRunner().invoke(main, list(args), catch_exceptions=False)


def test_run_makes_everything_then_nothing_then_what_changed(project, caplog):
    done = call("run", "run.yaml")
    assert done.exit_code == 0, done.output
    assert "control" in done.output
    assert json.loads(Path("runs/evaluation.json").read_text())["students"][1]["name"] == "control"
    times = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.*") if path.is_file()}
    caplog.clear()
    assert call("run", "run.yaml").exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert caplog.text.count("is up to date") == 6
    project["train-student"][1]["max_steps"] = 4
    Path("run.yaml").write_text(yaml.safe_dump(project))
    caplog.clear()
    assert call("run", "run.yaml").exit_code == 0
    assert caplog.text.count("is up to date") == 4  # student b and the evaluation run again
    assert json.loads(Path("runs/b/distillation.json").read_text())["steps"] == 4


def test_run_through_a_stage_and_a_stage_by_name(project):
    assert call("run", "run.yaml", "--through", "cache-logits").exit_code == 0
    assert Path("runs/cache/manifest.json").exists()
    assert not Path("runs/init").exists()
    assert call("run", "run.yaml", "init-student").exit_code == 0
    assert Path("runs/init/config.json").exists()
    del project["evaluate"]
    Path("run.yaml").write_text(yaml.safe_dump(project))
    failed = call("run", "run.yaml", "evaluate")
    assert failed.exit_code == 1
    assert "no section 'evaluate'" in failed.stderr


def test_the_commands_one_by_one(project):
    printed = {}
    for command in ("train-teacher", "cache-logits", "init-student", "train-student"):
        done = call(command, "--config", "run.yaml")
        assert done.exit_code == 0, done.output
        printed[command] = done.stdout
    # Every line with a metric names its rows.
    measured = r"accuracy [\d.]+%, .* on test, 30 labelled rows; trained on train, 72 labelled rows$"
    assert re.search(measured, printed["train-teacher"].strip())
    assert re.search(r"[\d,]+ parameters, [\d.]+% of the teacher's [\d,]+; 1 layer where the", printed["init-student"])
    assert re.search(
        r"3 steps in \d+ s, hard loss [\d.]+, soft loss [\d.]+ on train, 90 rows", printed["train-student"]
    )
    done = call("evaluate", "--config", "run.yaml", "--json")
    assert json.loads(done.stdout)["teacher"]["name"] == "teacher"
    done = call("verify", "--cache", "runs/cache")
    assert done.exit_code == 0
    assert "whole. 3 shards, 120 rows" in done.stdout
    done = call("inspect", "--cache", "runs/cache", "--rows", "1")
    for expected in (
        "task        sequence-classification, 3 classes",
        "encoding    full",
        "train: teacher agrees with the labels on ",
        "train",
        "teacher: ",
        "label ",
    ):
        assert expected in done.stdout
    totals = json.loads(call("inspect", "--cache", "runs/cache", "--json").stdout)["totals"]
    assert totals["train"]["rows"] == 90


def test_verify_fails_on_a_damaged_cache(project):
    call("run", "run.yaml", "--through", "cache-logits")
    path = Path("runs/cache/data/train-00000.parquet")
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    done = call("verify", "--cache", "runs/cache")
    assert done.exit_code == 1
    assert "train-00000.parquet" in done.stderr


def test_language_models_are_inspected_as_tokens(tmp_path, lm_tokenizer, documents, save_teacher):
    path = save_teacher(tiny_model("llama", len(lm_tokenizer), spread=4.0), lm_tokenizer)
    for split, rows in documents.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        rows.to_json(tmp_path / "data" / f"{split}.jsonl")
    done = call(
        "cache-logits",
        "--task",
        "causal-lm",
        "--teacher",
        str(path),
        "--dataset",
        str(tmp_path / "data"),
        "--output",
        str(tmp_path / "c"),
    )
    assert done.exit_code == 0, done.output
    done = call("inspect", "--cache", str(tmp_path / "c"), "--rows", "1", "--tokens", "3")
    assert "next token" in done.stdout
    assert "classes kept a position" in done.stdout
    assert "alignment" in done.stdout


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (("--dataset", "nowhere.jsonl"), 1, "nowhere.jsonl"),
        (("--text-column", "body"), 1, "--text-column"),
        (("--teacher", "./nowhere"), 1, "no such directory"),
        (("--teacher", "runs/teachr"), 1, "runs/teachr: no such file or directory; did you mean runs/teacher?"),
        (("--teacher", "runs/nothing"), 1, "no such file or directory; runs holds teacher"),
        (("--dataset", "runs/teacher"), 1, "runs/teacher: is a model directory, expected a data set"),
        (("--dataset", "dta"), 1, "dta: no such file or directory; did you mean data?"),
        (("--unlabelled", "data/tran.jsonl"), 1, "data/tran.jsonl: no such file"),
        (("--top-k", "3", "--encoding", "full"), 2, "--top-k is a knob of --encoding top-k"),
        (("--max-length", "1000"), 2, "at most 64 tokens"),
        (("--split", "dev"), 1, "no split 'dev'"),
        (("--output", "nowhere://bucket/x"), 1, "cannot be opened"),
        (("--dtype", "float7"), 2, "--dtype float7"),
        (("--task", "translation"), 2, "translation"),
        (("--rows-per-shard", "0"), 2, "--rows-per-shard"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(project, change, code, message):
    assert call("train-teacher", "--config", "run.yaml").exit_code == 0
    done = call("cache-logits", "--config", "run.yaml", *change)
    assert done.exit_code == code, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert len([line for line in done.stderr.splitlines() if line.startswith("Error")]) == 1
    assert not Path("runs/cache").exists()


def test_a_text_column_of_numbers(project):
    Path("numbers.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    call("train-teacher", "--config", "run.yaml")
    done = call("cache-logits", "--config", "run.yaml", "--dataset", "numbers.jsonl")
    assert done.exit_code == 1
    assert "text" in done.stderr


def test_labels_that_the_teacher_does_not_know(project):
    call("train-teacher", "--config", "run.yaml")
    Path("other.jsonl").write_text('{"text": "the cat", "label": "weather"}\n')
    done = call("cache-logits", "--config", "run.yaml", "--dataset", "other.jsonl")
    assert done.exit_code == 1
    assert "'weather'" in done.stderr


def test_an_empty_data_set(project):
    Path("empty.jsonl").write_text("")
    done = call("train-teacher", "--config", "run.yaml", "--dataset", "empty.jsonl")
    assert done.exit_code == 1
    assert "empty.jsonl" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["train-student", "--help"], ["cache-logits", "--help"]])
def test_help_imports_nothing_that_is_slow(arguments):
    """Modules that take seconds to import are not imported for the help."""
    code = (
        "import sys; from click.testing import CliRunner; from pipeline.cli import main; "
        f"assert CliRunner().invoke(main, {arguments}).exit_code == 0; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    imported = set(done.stdout.split())
    assert "click" in imported
    assert not imported & {"torch", "transformers", "datasets", "pandas", "scipy", "ray", "peft", "accelerate"}


def test_a_retrained_teacher_stops_run_until_the_cache_may_give_way(project):
    assert call("run", "run.yaml").exit_code == 0
    project["train-teacher"]["max_steps"] = 5
    Path("run.yaml").write_text(yaml.safe_dump(project))
    before = Path("runs/teacher/model.safetensors").read_bytes()
    for flags in ((), ("--dry-run",)):
        stopped = call("run", "run.yaml", *flags)
        assert stopped.exit_code == 1
        assert "runs/cache: was made with runs/teacher, which train-teacher would replace" in stopped.stderr
        assert "--overwrite" in stopped.stderr
    assert Path("runs/teacher/model.safetensors").read_bytes() == before
    assert call("run", "run.yaml", "train-teacher").exit_code == 0  # a stage that is named
    stopped = call("run", "run.yaml")
    assert stopped.exit_code == 1
    assert "weights_sha256" in stopped.stderr
    assert call("verify", "--cache", "runs/cache").exit_code == 0
    assert call("run", "run.yaml", "--overwrite").exit_code == 0


def test_a_student_of_other_settings_is_replaced_and_that_is_said(project, caplog):
    assert call("run", "run.yaml").exit_code == 0
    project["train-student"][0]["max_steps"] = 5
    Path("run.yaml").write_text(yaml.safe_dump(project))
    assert call("run", "run.yaml").exit_code == 0
    assert "train-student: runs/a has other settings or inputs, and is replaced" in caplog.text
    assert "runs/b has other" not in caplog.text


def test_what_was_made_by_hand_since_is_made_again(project, caplog):
    assert call("run", "run.yaml").exit_code == 0
    section = project["train-student"][0]
    command = [
        "train-student",
        "--cache",
        "runs/cache",
        "--student",
        "runs/init",
        "--output",
        section["output"],
        "--max-steps",
        "2",
    ]
    refused = call(*command)
    assert refused.exit_code == MisuseError.exit_code
    assert "--overwrite" in refused.stderr
    assert call(*command, "--overwrite").exit_code == 0
    caplog.clear()
    again = call("run", "run.yaml")
    assert again.exit_code == 0
    assert json.loads(Path("runs/a/distillation.json").read_text())["steps"] == 3


def test_a_device_without_memory_is_one_line(monkeypatch):
    import torch

    def run(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee documentation.")

    monkeypatch.setattr("pipeline.training.run.run", run)
    found = call("train-student", "--cache", "c", "--student", "s", "--output", "o")
    assert found.exit_code == 1
    assert re.fullmatch(
        r"Error: out of memory: CUDA out of memory\. Tried to allocate 2 GiB\.; use a smaller --batch-size.*kept\n",
        found.output,
    )


def test_an_interrupted_teacher_goes_on(project, caplog, monkeypatch):
    from pipeline.training import teacher

    project["train-teacher"]["training"] = {"save_strategy": "steps", "save_steps": 2}
    Path("run.yaml").write_text(yaml.safe_dump(project))

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "predict", interrupt)
        assert call("run", "run.yaml", "train-teacher").exit_code == 130
    caplog.clear()
    assert call("run", "run.yaml", "train-teacher").exit_code == 0
    assert "resuming from checkpoint-3" in caplog.text
    project["train-teacher"]["seed"] = 1
    Path("run.yaml").write_text(yaml.safe_dump(project))
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "predict", interrupt)
        assert call("run", "run.yaml", "train-teacher").exit_code == 130
    project["train-teacher"]["seed"] = 2  # files of another run are stale
    Path("run.yaml").write_text(yaml.safe_dump(project))
    assert call("run", "run.yaml", "train-teacher").exit_code == 0


def test_a_stale_teacher_gives_way_and_an_interrupted_student_goes_on(project, caplog, monkeypatch):
    from pipeline.training import run as training

    project["train-student"] = [{**project["train-student"][0], "training": {"save_steps": 2}}]
    project["evaluate"]["student"] = ["runs/a"]
    Path("run.yaml").write_text(yaml.safe_dump(project))

    def interrupt(trainer):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "detach_loss", interrupt)
        assert call("run", "run.yaml").exit_code == 130
    caplog.clear()
    assert call("run", "run.yaml", "--through", "train-student").exit_code == 0
    assert "resuming from checkpoint-3" in caplog.text

    with monkeypatch.context() as patch:  # files of an interrupted run are stale
        patch.setattr(training, "detach_loss", interrupt)
        project["train-student"][0]["seed"] = 1
        Path("run.yaml").write_text(yaml.safe_dump(project))
        assert call("run", "run.yaml", "train-student").exit_code == 130
    project["train-student"][0]["seed"] = 2
    Path("run.yaml").write_text(yaml.safe_dump(project))
    assert call("run", "run.yaml", "train-student").exit_code == 0
    assert json.loads(Path("runs/a/distillation.json").read_text())["seed"] == 2

    refused = call("train-teacher", "--config", "run.yaml")
    assert refused.exit_code == MisuseError.exit_code
    assert "runs/teacher: holds a finished model" in refused.stderr
    project["train-teacher"]["max_steps"] = 2
    Path("run.yaml").write_text(yaml.safe_dump(project))
    assert call("run", "run.yaml", "train-teacher").exit_code == 0


def test_one_output_for_several_sections_is_a_mistake(project):
    done = call("train-student", "--config", "run.yaml", "--output", "runs/x")
    assert done.exit_code == 2
    assert "2 train-student sections" in done.stderr


def test_a_damaged_shard_is_made_again_by_the_same_command(project):
    call("run", "run.yaml", "--through", "cache-logits")
    path = Path("runs/cache/data/train-00001.parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes(9))
    assert call("verify", "--cache", "runs/cache").exit_code == 1
    assert call("cache-logits", "--config", "run.yaml").exit_code == 0
    assert path.read_bytes() == whole
    assert call("verify", "--cache", "runs/cache").exit_code == 0


def test_kept_columns_of_a_csv_come_back(project):
    Path("rows.csv").write_text("name,text,label\na,the cat,film\nb,the dog,sport\n")
    call("train-teacher", "--config", "run.yaml")
    done = call(
        "cache-logits", "--config", "run.yaml", "--dataset", "rows.csv", "--keep-column", "name", "--output", "runs/csv"
    )
    assert done.exit_code == 0, done.output
    assert call("verify", "--cache", "runs/csv").exit_code == 0


@pytest.mark.parametrize(
    "args",
    [
        ["estimate", "--temperature", "1", "--temperature", "2"],
        ["train-student", "--learning-rate=1e-3", "--seed", "1", "--learning-rate", "1e-4"],
        ["predict", "--model", "a", "--model", "a"],
        ["cache-logits", "--overwrite", "--no-overwrite"],
        ["cache-logits", "--config", "a.yaml", "--config", "b.yaml"],
        ["run", "a.yaml", "--through", "evaluate", "--through", "cache-logits"],
    ],
)
def test_an_option_of_one_value_is_given_once(args):
    failed = call(*args)
    flag = next(arg.partition("=")[0] for arg in args if arg.startswith("--") and arg != "--seed")
    assert failed.exit_code == 2
    assert failed.output == f"Error: {flag}: takes one value, and is given 2 times; keep one\n"


def test_a_repeatable_option_is_given_often():
    failed = call("cache-logits", "--temperature", "1", "--temperature", "2", "--split", "a", "--split", "b")
    assert failed.exit_code == 2
    assert "missing --task" in failed.output


def test_models_and_caches_are_told_apart_by_name(project):
    assert call("run", "run.yaml", "--through", "cache-logits").exit_code == 0
    student = ["--student", "runs/cache", "--output", "runs/x"]
    swapped = call("train-student", "--cache", "runs/cache", *student)
    assert swapped.exit_code == 1
    assert "runs/cache: is a cache of soft labels (manifest.json), expected a model directory" in swapped.stderr
    for command in (["verify"], ["evaluate", "--student", "runs/teacher"], ["train-student", *student]):
        swapped = call(command[0], "--cache", "runs/teacher", *command[1:])
        assert swapped.exit_code == 1
        assert "runs/teacher: is a model directory, expected a cache" in swapped.stderr
    assert (
        "no cache here (no such file or directory; did you mean runs/cache?)"
        in call("verify", "--cache", "runs/cach").stderr
    )


def test_help_begins_with_what_is_required_and_has_groups():
    text = call("train-student", "--help").output
    assert text.startswith("Usage: main train-student --cache TEXT... --student TEXT --output TEXT [OPTIONS]")
    titles = [line[:-1] for line in text.splitlines() if re.fullmatch(r"[A-Z]\w+:", line)]
    assert titles == ["Required", "Data", "Model", "Loss", "Training", "Machine", "Output", "Options"]
    assert "[required]" in text
    assert "[default: ghost]" in text
    assert "[default: no-resume]" in text
    assert call("help", "train-student").output == text
    assert call("help").output == call("--help").output
    assert call("help", "nonsense").exit_code == 2
    assert call("-V").output == call("--version").output
    listed = re.findall(r"^  ([a-z-]+)  +[A-Z]", call("--help").output.partition("Commands:")[2], re.MULTILINE)
    assert listed[:5] == ["init", "train-teacher", "generate", "estimate", "cache-logits"]
    assert listed.index("init-student") < listed.index("train-student") < listed.index("evaluate")
    assert set(listed) == set(main.commands)


@pytest.mark.parametrize("name", sorted(main.commands))
def test_help_is_at_most_100_columns_and_examples_paste(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    lines = call(name, "--help").output.splitlines()
    assert not [line for line in lines if len(line) > 100]
    first = next(i for i, line in enumerate(lines) if line.startswith("  Example")) + 1
    example = "\n".join(
        itertools.takewhile(str.strip, itertools.dropwhile(lambda line: not line.strip(), lines[first:]))
    )
    words = shlex.split(example.replace("\\\n", " "))
    assert words[:2] == ["softlabel", name]
    context = main.commands[name].make_context(name, words[2:])  # every flag of the command is valid
    missing = [p.name for p in context.command.params if getattr(p, "needed", False) and not context.params[p.name]]
    assert not missing


def test_paths_are_completed_and_flags_too():
    shell = {**os.environ, "_SOFTLABEL_COMPLETE": "bash_complete", "COMP_CWORD": "2"}

    def completions(words: str) -> str:
        code = "import sys; from pipeline.cli import main; main(prog_name='softlabel')"
        env = {**shell, "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False).stdout

    assert "plain,--soft-weight" in completions("softlabel train-student --soft")
    assert completions("softlabel train-student --cache ru").startswith("file,")
