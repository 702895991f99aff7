"""Rounds of on-policy distillation.

Covers the steps of a configuration, their outputs, and their messages.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM

from pipeline.cache import Cache
from pipeline.config import CacheLogitsConfig, DataConfig, load_config, resolve, sections_for, steps_of
from pipeline.errors import CacheError, PipelineError
from pipeline.records import Loss
from pipeline.rounds import Written, WrittenCache, measure_written, progress, written_caches
from pipeline.steps import warn_of_steps
from pipeline.tasks import get_task
from pipeline.training.batches.collate import Collator, TrainingRows
from pipeline.training.batches.mixing import JoinedDataset
from pipeline.training.fused import Head, fused_loss
from pipeline.training.losses import distillation_loss
from pipeline.workflow import _steps, stage_configs
from tests.conftest import WORDS, tiny_model
from tests.support.generations import writing_model
from tests.support.processes import python
from tests.test_cli import call

# ------------------------------------------------------------------------- steps of a configuration

DEMO = Path(__file__).parents[1] / "data" / "bbc_lm" / "rounds.yaml"
EACH = {
    "generate": {"model": "s-{previous}", "dataset": "p", "output": "w-{round}", "seed": "{round}"},
    "cache-logits": [
        {"teacher": "t", "output": "off", "data": {"dataset": "d"}},
        {"teacher": "t", "output": "c-{round}", "data": {"dataset": "w-{round}"}},
    ],
    "init-student": {"teacher": "t", "output": "s-0"},
    "train-student": {
        "cache": ["c-{round}", "off"],
        "mix": "data",
        "student": "s-{previous}",
        "output": "s-{round}",
    },
    "evaluate": {"cache": "off", "student": ["s-0", "s-2"], "output": "e"},
}


def load(folder: Path, **content):
    path = folder / "rounds.yaml"
    path.write_text(yaml.safe_dump({"task": "causal-lm", **content}, sort_keys=False))
    return load_config(path)


def outputs(file, *stages, through=None):
    return [str(config.output) for _, config in stage_configs(file, stages, through)]


def test_sections_with_a_placeholder_are_run_once_a_round(tmp_path):
    file = load(tmp_path, rounds=2, **EACH)
    assert outputs(file) == ["off", "s-0", "w-1", "c-1", "s-1", "w-2", "c-2", "s-2", "e"]
    found = {config.output: config for _, config in stage_configs(file)}
    assert (found["w-2"].model, found["w-2"].seed, found["c-2"].data.dataset) == ("s-1", 2, "w-2")
    assert (found["s-2"].cache, found["s-2"].student) == (("c-2", "off"), "s-1")
    assert [step.round for step in steps_of(file)] == [None, None, 1, 1, 1, 2, 2, 2, None]
    more = load(tmp_path, rounds=3, **EACH)
    assert outputs(more)[:8] == outputs(file)[:8]  # finished steps keep their outputs


def test_an_evaluation_of_each_round_stands_in_its_round(tmp_path):
    each = {"cache": "off", "student": "s-{round}", "output": "e-{round}"}
    file = load(tmp_path, rounds=2, **{**EACH, "evaluate": [each, EACH["evaluate"]]})
    assert outputs(file)[-6:] == ["e-1", "w-2", "c-2", "s-2", "e-2", "e"]


def test_without_rounds_the_order_is_that_of_the_stages(tmp_path):
    sections = {
        "train-student": {"cache": "c", "student": "s", "output": "s-1"},
        "cache-logits": EACH["cache-logits"][0],
    }
    sections["generate"] = {"model": "t", "dataset": "p", "output": "w"}
    assert outputs(load(tmp_path, **sections)) == ["w", "off", "s-1"]


@pytest.mark.parametrize(
    ("stage", "last"), [("init-student", "s-0"), ("generate", "w-2"), ("cache-logits", "c-2"), ("train-student", "s-2")]
)
def test_through_a_stage_ends_after_its_last_step(tmp_path, stage, last):
    """The named stage runs in all rounds, after the steps that it needs."""
    file = load(tmp_path, rounds=2, **EACH)
    everything = outputs(file)
    assert outputs(file, through=stage) == everything[: everything.index(last) + 1]
    assert outputs(file, "cache-logits", through=stage) == [
        name for name in outputs(file, through=stage) if name in ("off", "c-1", "c-2")
    ]


def test_the_demo_of_rounds_is_whole():
    steps = [(name, Path(config.output).name) for name, config in stage_configs(load_config(DEMO))]
    each = [("generate", "written-{}"), ("cache-logits", "cache-{}"), ("train-student", "student-{}")]
    rounds = [(name, output.format(number)) for number in (1, 2) for name, output in each]
    assert [step for step in steps if step in rounds] == rounds == steps[3:-1]
    assert steps[-1] == ("evaluate", "bbc_lm_rounds")


def changed(stage, **settings):
    section = EACH[stage][1] if isinstance(EACH[stage], list) else EACH[stage]
    return {**EACH, stage: {**section, **settings}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (EACH, "generate: model: 's-{previous}' is a placeholder for the number of a round, but the file has no rounds"),
        ({"rounds": 2, "init-student": EACH["init-student"]}, "rounds: 2, and no section of a stage is run once a round"),
        ({"rounds": 0, **EACH}, "rounds: expected a whole number of at least 1, found 0"),
        ({"rounds": True, **EACH}, "rounds: expected a whole number of at least 1, found True"),
        ({"rounds": "2", **EACH}, "rounds: expected a whole number of at least 1, found '2'"),
        ({"round": 2, **EACH}, "unknown key 'round'; did you mean 'rounds'"),
        (
            {"rounds": 2, **changed("train-student", output="s")},
            "train-student: output: s is written in round 1 and in round 2; put {round} into it",
        ),
        (
            {"rounds": 2, **changed("init-student", output="x"), "train-student": [
                EACH["train-student"], {"cache": "off", "student": "x", "output": "./s-1"}]},
            "train-student: output: s-1 is written outside the rounds and in round 1",
        ),
        (
            {"rounds": 2, "data": {"dataset": "w-{round}"}, **EACH},
            "data.dataset: 'w-{round}' is shared by all sections",
        ),
        (
            {"rounds": 1, **changed("generate", model="s-{previus}")},
            "generate: model: 's-{previus}': {previus} is no placeholder; did you mean {previous}?",
        ),
        ({"rounds": 1, **changed("cache-logits", data={"dataset": "w-{ round }", "split": "a-{round}"})}, "did you mean {round}?"),
        ({"rounds": 1, **changed("train-student", output="s-{round:02}", cache=["c-{round}"], mix=None)}, "did you mean {round}?"),
        (
            {"rounds": 2, **changed("cache-logits", output="w-{round}")},
            "cache-logits: output: w-1 is written by generate too; name another",
        ),
        (
            {"rounds": 2, **changed("generate", model="s-{round}")},
            "generate in round 1 reads s-1, which train-student makes later in round 1; ",
        ),
        (
            {"rounds": 2, **changed("cache-logits", data={"dataset": "w-{round}"}), "generate": {
                **EACH["generate"], "dataset": "./c-{round}"}},
            "generate in round 1 reads c-1, which cache-logits makes later in round 1; ",
        ),
        (
            {"rounds": 2, **changed("train-student", student="./s-{round}")},
            "train-student s-1: student and output are one directory",
        ),
        ({"rounds": 2, **changed("train-student", mix=None)}, "train-student s-1: several --cache: say --mix teachers"),
        (
            {"rounds": 2, **changed("train-student", proportion=[1])},
            "train-student s-1: --proportion: expected 2 above 0, one for each --cache, found 1",
        ),
        (
            {"rounds": 2, **changed("train-student", divergence="reverse-kl")},
            "train-student s-1: c-1: --divergence reverse-kl: is not linear in the teacher's probabilities",
        ),
        (
            {"rounds": 2, **EACH, "cache-logits": [EACH["cache-logits"][0], {**EACH["cache-logits"][1], "top_k": 8}]},
            "train-student s-1: off: encoding: expected top-k, k 8, temperatures (1.0, 2.0, 4.0), as c-1 has, found sampled,",
        ),
        (
            {"rounds": 2, **changed("generate", seed={"round": None})},
            'generate: seed: put {round} in quotes: "{round}"',
        ),
    ],
)  # fmt: skip
def test_what_makes_no_rounds_is_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(PipelineError) as refused:
        list(stage_configs(load(tmp_path, **content)))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_braces_that_are_no_placeholder_stay(tmp_path):
    """Braces in templates and stop strings, and in names that resemble neither placeholder."""
    asked = {"stop": ["{round:d}"], "chat_template_kwargs": ["a={rounds}"], "dataset": "p-{lang}"}
    file = load(tmp_path, rounds=1, **changed("generate", **asked))
    assert "w-1" in outputs(file)


def warnings_of(caplog, file):
    caplog.clear()
    warn_of_steps(_steps(file, (), None))
    return [record.getMessage() for record in caplog.records]


def test_one_seed_in_all_rounds_is_warned_of(tmp_path, caplog):
    share = changed("train-student", proportion=[0.5, 0.5], seed="{round}")
    assert warnings_of(caplog, load(tmp_path, rounds=3, **share)) == []
    share["generate"] = {**share["generate"], "seed": 7}
    (line,) = warnings_of(caplog, load(tmp_path, rounds=3, **share))
    assert line.startswith(
        "generate: seed 7 on the same prompts in round 1 and in round 2: equal prompts get equal random"
    )
    for others in ({"rows": "{previous}0:{round}0"}, {"temperature": 0}, {"dataset": "p-{round}"}):
        share["generate"] |= others
        assert warnings_of(caplog, load(tmp_path, rounds=3, **share)) == [], others
    share = changed("train-student", proportion=[0.5, 0.5])
    (line,) = warnings_of(caplog, load(tmp_path, rounds=3, **share))
    assert line.startswith("train-student: seed 0 in round 1 and in round 2: its proportion of off takes the same rows")
    assert warnings_of(caplog, load(tmp_path, rounds=1, **share)) == []


def test_held_out_rows_that_a_student_writes_after_are_warned_of(tmp_path, caplog):
    file = load(tmp_path, rounds=2, data={"holdout": 0.1}, **changed("generate", dataset="./d"))
    lines = warnings_of(caplog, file)
    assert [line.partition(":")[0] for line in lines] == ["cache-logits c-1", "generate w-1"]
    assert "holdout 0.1 sets aside some of the generated rows" in lines[0]
    assert "those that holdout 0.1 sets aside as test in off included" in lines[1]
    off, own = EACH["cache-logits"]
    own = {**own, "data": {**own["data"], "holdout": 0}}
    both = {**EACH, "cache-logits": [off, own], "generate": {**EACH["generate"], "dataset": "d", "split": "test"}}
    assert warnings_of(caplog, load(tmp_path, rounds=2, data={"holdout": 0.1}, **both)) == []


def test_a_command_of_its_own_does_not_take_a_placeholder_for_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = load(tmp_path, rounds=2, **EACH)
    assert len(sections_for(file, "evaluate")) == 1
    done = call("train-student", "--config", "rounds.yaml")
    assert done.exit_code == 1
    assert "train-student: cache: 'c-{round}' stands for the number of a round" in done.stderr
    assert "softlabel run rounds.yaml train-student" in done.stderr


@pytest.mark.parametrize(
    "shared", [{"messages_column": "chat"}, {"prompt_column": "p", "completion_column": "c"}, {"text_column": "body"}]
)
def test_a_section_that_reads_token_ids_drops_the_shared_input(tmp_path, shared):
    own = {"dataset": "w", "input_ids_column": "input_ids", "labels_column": "labels"}
    file = load(
        tmp_path,
        data={"dataset": "d", "max_length": 64, **shared},
        **{"cache-logits": [{"teacher": "t", "output": "a", "data": own}, {"teacher": "t", "output": "b"}]},
    )
    ids, plain = (config.data for _, config in stage_configs(file))
    assert ids.columns.input_ids == "input_ids"
    assert (ids.columns.messages, ids.columns.prompt, ids.columns.text) == (None, None, None)
    assert ids.max_length == 64
    assert plain == DataConfig(dataset="d", max_length=64, **shared)
    flag = {"input_ids_column": "ids", "dataset": "w", "teacher": "t", "output": "a"}
    assert resolve(CacheLogitsConfig, file, {}, flag).data.columns.input_ids == "ids"


# ----------------------------------------------------------------------------- outputs of the steps


def write_project(lm_tokenizer):
    """Write a teacher, a student model, prompts and texts to the working directory.

    Returns:
        The sections of two rounds.
    """
    models = {
        "teacher": tiny_model("llama", len(lm_tokenizer), spread=3.0, seed=5),
        "student-0": writing_model(len(lm_tokenizer)),
    }
    for name, model in models.items():
        model.save_pretrained(name)
        lm_tokenizer.save_pretrained(name)
    Path("data").mkdir()
    texts = [" ".join(WORDS[i % 9 : i % 9 + 6 + i % 5]) for i in range(12)]
    Dataset.from_dict({"text": texts}).to_json("data/train.jsonl")
    Dataset.from_dict({"prompt": [" ".join(WORDS[i : i + 2]) for i in range(12)]}).to_json("prompts.jsonl")
    kept = {"teacher": "teacher", "encoding": "top-k", "top_k": 8, "temperature": [1]}
    ids = {"dataset": "written-{round}", "input_ids_column": "input_ids", "labels_column": "labels"}
    return {
        "rounds": 2,
        "data": {"dataset": "data", "max_length": 32},
        "generate": {
            "model": "student-{previous}",
            "dataset": "prompts.jsonl",
            "output": "written-{round}",
            "max_new_tokens": 8,
            "rows_per_shard": 4,
            "seed": "{round}",
        },
        "cache-logits": [
            {**kept, "output": "cache-off"},
            {**kept, "output": "cache-{round}", "data": ids},
        ],
        "train-student": {
            "cache": ["cache-{round}", "cache-off"],
            "proportion": [0.75, 0.25],
            "student": "student-{previous}",
            "output": "student-{round}",
            "divergence": "reverse-kl",
            "hard_weight": 0,
            "soft_weight": 1,
            "max_steps": 4,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "training": {"save_strategy": "no"},
        },
    }


@pytest.fixture
def project(tmp_path, lm_tokenizer, monkeypatch):
    """Write two rounds of a tiny student with an additional off-policy cache of texts."""
    monkeypatch.chdir(tmp_path)
    return write_project(lm_tokenizer)


@pytest.fixture(scope="module")
def captured(tmp_path_factory, lm_tokenizer):
    """Run up to the caches; return the folder and the output."""
    folder = tmp_path_factory.mktemp("rounds")
    with contextlib.chdir(folder):
        load(folder, **{**write_project(lm_tokenizer), "rounds": 1})
        done = call("run", "rounds.yaml", "--through", "cache-logits")
    assert done.exit_code == 0, done.output
    return folder, done.stdout


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def stamps():
    kept = ("written-*/**/*", "cache-*/**/*", "student-[12]/**/*")
    return {p: p.stat().st_mtime_ns for pattern in kept for p in Path().glob(pattern) if p.is_file()}


@pytest.mark.full
def test_rounds_killed_in_the_second_go_on_and_then_nothing_is_left_to_do(tmp_path, project, caplog):
    load(tmp_path, **project)
    code = """
import glob, os, signal
from pipeline.cache.storage.crash import hooked
from pipeline.cli import main
def hook(point):
    if glob.glob("written-2/receipts/prompts-*.json") or glob.glob("written-2/receipts/train-*.json"):
        os.kill(os.getpid(), signal.SIGKILL)
with hooked(hook):
    main.main(["run", "rounds.yaml"], standalone_mode=False)
"""
    done = python("-c", code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    first = stamps()
    assert Path("student-1/distillation.json").is_file()
    assert len(list(Path("written-2/samples").glob("[!.]*.parquet"))) == 1
    assert not Path("written-2/generation.json").exists()
    done = call("run", "rounds.yaml")
    assert done.exit_code == 0, done.output
    again = stamps()
    assert all(again[path] == first[path] for path in first if "written-2" not in str(path))
    assert caplog.text.count("is up to date") == 4  # cache-off and the first round
    assert "round 1: the teacher's loss on what the student wrote is" in done.stdout
    assert "round 2: the teacher's loss on what the student wrote is" in done.stdout
    start, one, two = (weights_of(f"student-{number}") for number in range(3))
    assert all(any(not torch.equal(a[name], b[name]) for name in a) for a, b in ((start, one), (one, two)))
    origin = [json.loads(Path(f"student-{number}/origin.json").read_text()) for number in (1, 2)]
    assert origin[0]["student_sha256"] != origin[1]["student_sha256"]

    caplog.clear()
    done = call("run", "rounds.yaml")
    assert done.exit_code == 0
    assert caplog.text.count("is up to date") == 7
    assert stamps() == again

    caplog.clear()
    project["rounds"] = 3
    load(tmp_path, **project)
    assert call("run", "rounds.yaml", "--through", "generate").exit_code == 0
    assert caplog.text.count("is up to date") == 7
    assert Path("written-3/generation.json").is_file()


@pytest.mark.full
def test_a_round_killed_when_its_weights_are_saved_is_trained_again(tmp_path, project):
    """Without checkpoints a killed student is trained again from the start."""
    project["rounds"] = 1
    load(tmp_path, **project)
    code = """
import os, signal
from pipeline.cli import main
from pipeline.training import run
run.make_card = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
main.main(["run", "rounds.yaml"], standalone_mode=False)
"""
    done = python("-c", code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert Path("student-1/model.safetensors").is_file()
    assert not Path("student-1/distillation.json").exists()
    saved = weights_of("student-1")
    done = call("run", "rounds.yaml")
    assert done.exit_code == 0, done.output
    assert Path("student-1/distillation.json").is_file()
    again = weights_of("student-1")
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_a_changed_prompt_makes_the_rounds_anew_when_asked_to(tmp_path, project):
    project["rounds"] = 1
    load(tmp_path, **project)
    assert call("run", "rounds.yaml").exit_code == 0
    before = weights_of("student-1")
    Dataset.from_dict({"prompt": [" ".join(WORDS[i : i + 3]) for i in range(12)]}).to_json("prompts.jsonl")
    refused = call("run", "rounds.yaml")
    assert refused.exit_code == 1
    assert "written-1" in refused.stderr
    assert weights_of("student-1").keys() == before.keys()
    shown = call("run", "rounds.yaml", "--overwrite", "--dry-run")
    assert shown.exit_code == 0
    assert "has other settings or inputs; the existing output is replaced" in shown.stdout
    assert call("run", "rounds.yaml", "--overwrite").exit_code == 0
    after = weights_of("student-1")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_dry_run_shows_every_round_and_writes_nothing(tmp_path, project):
    load(tmp_path, **project)
    done = call("run", "rounds.yaml", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "generate written-2" in done.stdout
    assert "reads student-1, which a stage before makes" in done.stdout
    assert not any(Path(name).exists() for name in ("written-1", "cache-off", "student-1"))


def test_hard_labels_that_the_student_wrote_are_warned_of(tmp_path, project, caplog):
    project["rounds"] = 1
    del project["train-student"]["hard_weight"]
    load(tmp_path, **project)
    assert call("run", "rounds.yaml").exit_code == 0
    assert "hard_weight is not given: the hard labels of cache-1 are the tokens that a student wrote" in caplog.text


def test_the_teachers_loss_and_the_reverse_kl_are_those_of_plain_passes(captured):
    """Compares in float64, over the completions alone."""
    folder, printed = captured
    found = measure_written(folder / "cache-1", folder / "written-1")
    teacher, student = (AutoModelForCausalLM.from_pretrained(folder / n).double() for n in ("teacher", "student-0"))
    nll = kl = tokens = 0.0
    for row in Cache.open(folder / "cache-1").dataset("train"):
        ids = torch.as_tensor(np.asarray(row.example.input_ids, dtype=np.int64))[None]
        at = np.flatnonzero(row.example.supervised)
        with torch.inference_mode():
            taught, own = (
                torch.log_softmax(model(ids).logits[0], -1)[at, ids[0, at + 1]] for model in (teacher, student)
            )
        nll, kl, tokens = nll - float(taught.sum()), kl + float((own - taught).sum()), tokens + len(at)
    assert found.tokens == tokens
    assert found.teacher_nll == pytest.approx(nll / tokens, rel=1e-4)
    assert found.reverse_kl == pytest.approx(kl / tokens, rel=1e-3)
    assert f"is {found.teacher_nll:.3f} nats a token; KL(student || teacher) {found.reverse_kl:.3f}" in printed


SERVED = {"name": "m", "api": "openai", "version": None, "own_settings": ["repetition_penalty"]}


@pytest.mark.parametrize(
    "changed",
    [
        ("sampling", "temperature", 0.7),
        ("sampling", "top_k", 3),
        ("dropped", None, ["cut"]),
        ("model", None, SERVED),
    ],
)
def test_no_reverse_kl_of_draws_that_are_not_the_students_own(captured, tmp_path, changed):
    folder, _ = captured
    shutil.copytree(folder / "written-1", tmp_path / "written")
    end = json.loads((tmp_path / "written" / "generation.json").read_text())
    name, field, value = changed
    if field is None:
        end["contract"][name] = value
    else:
        end["contract"][name][field] = value
    (tmp_path / "written" / "generation.json").write_text(json.dumps(end))
    whole, other = (measure_written(folder / "cache-1", path) for path in (folder / "written-1", tmp_path / "written"))
    assert other == dataclasses.replace(whole, reverse_kl=None)
    assert whole.reverse_kl is not None
    with pytest.raises(CacheError, match="no finished generated data set here"):
        measure_written(folder / "cache-1", tmp_path)


def changed_copy(folder, target, change):
    """Copy the first round's generated data set with changed column values."""
    shutil.copytree(folder / "written-1", target)
    for path in (target / "data").glob("*.parquet"):
        table = pq.read_table(path)
        for name, values in change(table).items():
            field = table.schema.field(name)
            table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
        pq.write_table(table, path)
    return target


def test_draws_without_a_filter_are_the_students_own_and_those_with_other_ids_are_not(captured, tmp_path):
    folder, _ = captured
    whole = measure_written(folder / "cache-1", folder / "written-1")
    shutil.copytree(folder / "written-1", tmp_path / "written")
    end = tmp_path / "written" / "generation.json"
    end.write_text(end.read_text().replace('"top_p": null', '"top_p": 1.0'))
    assert measure_written(folder / "cache-1", tmp_path / "written") == whole
    retokenized = changed_copy(folder, tmp_path / "ids", lambda table: {"ids_from": ["tokenizer"] * len(table)})
    found = measure_written(folder / "cache-1", retokenized)
    assert found == dataclasses.replace(whole, reverse_kl=None)


def test_the_cache_of_another_data_set_is_refused_however_many_tokens_it_has(captured, tmp_path):
    folder, _ = captured
    other = changed_copy(
        folder, tmp_path / "other", lambda t: {"input_ids": [[7, *row[1:]] for row in t["input_ids"].to_pylist()]}
    )
    with pytest.raises(CacheError, match=r"cache-1: is not of .*other: 12 of its 12 rows are not among the 12 written"):
        measure_written(folder / "cache-1", other)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "on what the student wrote and its prompts is .* tokens of written-1, of which 91 were written: .*labels_column"),
        (("--labels-column", "labels", "--max-length", "6"), "on what the student wrote is .*; 25 of the 91 tokens of written-1"),
    ],
)  # fmt: skip
def test_a_cache_of_more_or_less_than_was_written_is_told(captured, tmp_path, flags, said):
    folder, _ = captured
    base = (
        "cache-logits",
        "--task",
        "causal-lm",
        "--teacher",
        str(folder / "teacher"),
        "--input-ids-column",
        "input_ids",
    )
    done = call(*base, "--dataset", str(folder / "written-1"), "--output", str(tmp_path / "c"), *flags)
    assert done.exit_code == 0, done.output
    with contextlib.chdir(folder):
        line = progress(str(tmp_path / "c"), WrittenCache(1, "written-1", 0), {})
    assert re.search(said, line), line
    assert "KL(" not in line


def test_a_round_is_compared_with_the_same_sections_of_the_round_before(captured, tmp_path):
    """A round that generates for training and for evaluation is compared section by section."""
    two = [EACH["generate"], {**EACH["generate"], "output": "h-{round}"}]
    caches = [*EACH["cache-logits"], {"teacher": "t", "output": "hc-{round}", "data": {"dataset": "h-{round}"}}]
    file = load(tmp_path, rounds=2, **{**EACH, "generate": two, "cache-logits": caches})
    found = written_caches(_steps(file, (), None))
    assert {os.path.basename(cache): each for cache, each in found.items()} == {
        f"{prefix}c-{number}": WrittenCache(number, f"{name}-{number}", section)
        for number in (1, 2)
        for prefix, name, section in (("", "w", 0), ("h", "h", 1))
    }
    folder, _ = captured
    with contextlib.chdir(folder):
        told = {(1, 1): Written(1, 77.0, None, 1)}
        first = progress("cache-1", WrittenCache(1, "written-1", 0), told)
        again = progress("cache-1", WrittenCache(2, "written-1", 0), told)
    nll = re.search(r"is ([0-9.]+) nats", first)[1]
    assert f"is {nll} nats a token (round 1: {nll}); KL" in again


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["reverse-kl", "jensen-shannon"])
def test_the_loss_over_what_was_written_is_the_dense_one_in_float64(captured, kind, fused):
    """Compares over K + 1 buckets at the completions, in batches that contain text rows too."""
    folder, _ = captured
    caches = [Cache.open(folder / name) for name in ("cache-1", "cache-off")]
    rows = TrainingRows(JoinedDataset(caches, "train", window=4))
    collator = Collator(get_task("causal-lm"), caches[0].tokenizer, 1.0, pad_id=0)
    batch = collator.collate(rows.__getitems__([0, 5, 11, 14, 20]))
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / n).double() for n in ("student-0", "teacher"))
    with torch.no_grad():
        hidden = student.model(**batch.inputs).last_hidden_state[batch.supervised]
        logits = student.lm_head(hidden)
        taught = torch.softmax(teacher(**batch.inputs).logits[batch.supervised], -1)
    kept = taught.topk(8, -1)
    q = torch.cat([kept.values, 1 - kept.values.sum(-1, keepdim=True)], -1)
    own = torch.softmax(logits, -1).gather(-1, kept.indices)
    p = torch.cat([own, 1 - own.sum(-1, keepdim=True)], -1)
    middle = (p + q) / 2
    expected = (p * (p / q).log()).sum(-1)
    if kind == "jensen-shannon":
        expected = ((q * (q / middle).log()).sum(-1) + (p * (p / middle).log()).sum(-1)) / 2
    settings = {
        "labels": batch.labels,
        "loss": Loss(0.0, 1.0, divergence=kind),
        "temperature": 1.0,
        "weights": batch.weights,
        "soft_weights": batch.soft_weights,
    }
    if fused:
        found = fused_loss(hidden, Head(student.lm_head.weight), batch.target, **settings)
    else:
        found = distillation_loss(logits, batch.target, **settings)
    assert len(batch.labels) == len(expected) > 20
    assert float(found.soft_sum) == pytest.approx(float(expected.sum()), rel=1e-4)
