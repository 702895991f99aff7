"""`softlabel run`: its final report, and the files that a stage depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import yaml

from pipeline.config import load_config
from pipeline.workflow import _key, content_of, outline, stage_configs
from tests.test_cli import call, project  # noqa: F401 - a fixture


def test_run_ends_with_the_report_where_the_file_has_one(project, caplog, monkeypatch):
    monkeypatch.setattr("pipeline.evaluation.report.report.draw_all", lambda _: ())  # drawing takes seconds
    report = {"cache": "runs/cache", "student": "runs/a", "control": "control=runs/b", "output": "runs/report"}
    project["report"] = {**report, "rounds": 0, "resamples": 100}
    Path("run.yaml").write_text(yaml.safe_dump(project))
    done = call("run", "run.yaml")
    assert done.exit_code == 0, done.output
    assert "kept in runs/report/report.html" in done.stdout
    made = Path("runs/report/report.json").stat().st_mtime_ns
    again = call("run", "run.yaml")
    assert again.stdout.count("kept in runs/report/report.html") == 1
    assert "report: runs/report is up to date" in caplog.text
    assert Path("runs/report/report.json").stat().st_mtime_ns == made
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        assert call("run", "run.yaml").exit_code == 0
    Path("runs/b/distillation.json").write_text(Path("runs/b/distillation.json").read_text() + " ")  # a changed control
    assert call("run", "run.yaml", "report").exit_code == 0
    assert Path("runs/report/report.json").stat().st_mtime_ns > made


def test_a_cache_that_no_stage_makes_is_found_before_the_first_one(project):
    project["evaluate"]["cache"] = "runs/cach"
    Path("run.yaml").write_text(yaml.safe_dump(project))
    for flags in ((), ("--dry-run",)):
        done = call("run", "run.yaml", *flags)
        assert done.exit_code == 1
        assert "run.yaml: evaluate: cache: runs/cach is not there, and no stage that is run makes it" in done.stderr
        assert done.stderr.strip().endswith("did you mean runs/cache?")
    assert not Path("runs").exists()


def test_a_report_that_cannot_be_drawn_is_said_first(project, monkeypatch):
    project["report"] = {"cache": "runs/cache", "student": "runs/a", "output": "runs/report"}
    Path("run.yaml").write_text(yaml.safe_dump(project))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = call("run", "run.yaml")
    assert done.exit_code == 2
    assert "softlabel report draws with matplotlib" in done.stderr
    assert not Path("runs/teacher").exists()


def test_only_the_files_named_make_a_stage_stale(project, caplog):
    project["data"]["data_files"] = {"train": ["train.jsonl"], "test": "test.jsonl"}
    Path("run.yaml").write_text(yaml.safe_dump(project))
    assert call("run", "run.yaml", "--through", "train-teacher").exit_code == 0
    Path("data/notes.jsonl").write_text("{}")
    caplog.clear()
    assert call("run", "run.yaml", "--through", "train-teacher").exit_code == 0
    assert "train-teacher: runs/teacher is up to date" in caplog.text
    rows = Path("data/train.jsonl").read_text().splitlines(keepends=True)
    Path("data/train.jsonl").write_text("".join(rows[:-1]))
    caplog.clear()
    assert call("run", "run.yaml", "--through", "train-teacher").exit_code == 0
    assert "up to date" not in caplog.text


def test_a_file_that_moves_to_another_split_makes_a_stage_stale(project, caplog):
    project["data"]["data_files"] = {"train": "train*.jsonl", "test": "test*.jsonl"}
    Path("run.yaml").write_text(yaml.safe_dump(project))
    Path("data/train-2.jsonl").write_text(Path("data/test.jsonl").read_text())
    assert call("run", "run.yaml", "--through", "train-teacher").exit_code == 0
    Path("data/train-2.jsonl").rename("data/test-0.jsonl")
    caplog.clear()
    assert call("run", "run.yaml", "--through", "train-teacher").exit_code == 0
    assert "up to date" not in caplog.text


def test_what_was_made_with_the_defaults_of_before_stays_done(project):
    """Outputs of earlier defaults stay up to date after an upgrade.

    Retraining the teacher would invalidate its cache.
    """
    Path("run.yaml").write_text(yaml.safe_dump(project))
    ((_, config),) = stage_configs(load_config("run.yaml"), ("train-teacher",))
    plain = dataclasses.replace(config, epochs=None, max_steps=None, learning_rate=None, batch_size=None)
    old = dataclasses.replace(config, epochs=3.0, max_steps=-1, learning_rate=5e-5, batch_size=16)
    assert _key(plain, before=True) == _key(old, before=True)
    assert _key(plain) != _key(old)
    settings = {name: value for name, value in dataclasses.asdict(old).items() if name not in _NEWER}
    found = {"dataset": [content_of(Path(old.data.dataset))], "model": [content_of(Path(old.model))], "files": None}
    kept = hashlib.sha256(json.dumps([settings, found], sort_keys=True, default=str).encode()).hexdigest()
    assert _key(plain, before=True) == kept


def test_a_prompt_template_in_the_file_is_part_of_the_settings(project, tmp_path):
    long = "Which topic is it?\n" * 20 + "{{ text }}:"
    project["cache-logits"] |= {"prompt_template": long, "label_text": ["film", "sport"]}
    Path("run.yaml").write_text(yaml.safe_dump(project))
    ((_, config),) = stage_configs(load_config("run.yaml"), ("cache-logits",))
    assert config.prompt_template == long
    assert _key(config) == _key(dataclasses.replace(config))
    assert _key(config) != _key(dataclasses.replace(config, prompt_template=long + "!"))
    file = Path("prompt.jinja")
    named = dataclasses.replace(config, prompt_template=str(file))
    keys = []
    for text in ("{{ text }} is", "{{ text }} is about"):
        file.write_text(text)
        keys.append(_key(named))
    assert keys[0] != keys[1]


#: Fields that earlier releases did not include in a stage's key, or that it never includes.
_NEWER = ("overwrite", "report_to", "on_bad_row")


def test_a_student_whose_tokenizer_is_trained_waits_for_the_cache(project):
    project["init-student"] |= {"tokenizer": "train:290", "cache": "runs/cache"}
    Path("run.yaml").write_text(yaml.safe_dump(project, sort_keys=False))
    ((_, config),) = stage_configs(load_config("run.yaml"), ("init-student",))
    told = dict(outline(load_config("run.yaml"), {}))
    waits = "runs: reads runs/cache, runs/teacher, which a stage before makes"
    assert told["init-student runs/init"] == (("stage", waits),)
    assert call("run", "run.yaml", "--through", "init-student").exit_code == 0
    made = _key(config)
    assert json.loads(Path("runs/init/config.json").read_text())["vocab_size"] == 290
    Path("runs/cache/manifest.json").write_text(Path("runs/cache/manifest.json").read_text() + " ")
    assert _key(config) != made


def test_students_that_were_made_before_they_could_have_a_tokenizer_stay_done(project):
    ((_, config),) = stage_configs(load_config("run.yaml"), ("init-student",))
    settings = dataclasses.asdict(config)
    assert (settings.pop("tokenizer"), settings.pop("cache")) == (None, None)
    found = {"teacher": [content_of(Path(config.teacher))]}
    kept = hashlib.sha256(json.dumps([settings, found], sort_keys=True, default=str).encode()).hexdigest()
    assert _key(config) == kept
