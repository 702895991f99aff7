"""`softlabel init` writes a file that `softlabel run` accepts, for every file layout."""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.config import ConfigFile, DataConfig, InitConfig, load_config
from pipeline.errors import MisuseError, PipelineError, SourceError
from pipeline.starter import run
from pipeline.starter.records import Start
from pipeline.workflow import stage_configs
from tests.conftest import TOPICS, sentence, tiny_model

NAMES = list(TOPICS)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def encoder(bert_tokenizer, save_teacher) -> str:
    save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=2).bert, bert_tokenizer, "encoder")
    return "encoder"


def rows(count: int = 80, *, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    topics = [NAMES[i % 3] for i in range(count)]
    return [{"text": sentence(rng, rng.randint(4, 20), topic), "label": topic} for topic in topics]


def write_csv(path: str, rows: list[dict[str, Any]], names: dict[str, str], delimiter: str = ",", bom: str = "") -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", encoding="utf-8", newline="") as handle:
        handle.write(bom)
        writer = csv.writer(handle, delimiter=delimiter)
        writer.writerow(["Nr", *names.values()])
        for i, row in enumerate(rows):
            writer.writerow([i, *(row[name] for name in names)])
    return path


def write_jsonl(path: str, rows: list[Any]) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def init(**settings: Any) -> tuple[Start, ConfigFile, dict[str, list[Any]]]:
    """Run `init`; return its findings, the file, and the configuration of each stage."""
    start = run(InitConfig(output="out.yaml", **settings))
    file = load_config("out.yaml")
    stages: dict[str, list[Any]] = {}
    for name, config in stage_configs(file):
        stages.setdefault(name, []).append(config)
    return start, file, stages


def test_labelled_rows_alone(encoder):
    write_csv("tickets.csv", rows(), {"text": "Ticket Body", "label": "Kategorie"}, ";", "\ufeff")
    start, _, stages = init(dataset="tickets.csv", model=encoder)
    data = stages["train-teacher"][0].data
    expected = DataConfig(
        dataset="tickets.csv", text_column="Ticket Body", label_column="Kategorie", holdout=0.1, max_length=32
    )
    assert data == expected == stages["cache-logits"][0].data
    assert list(stages) == ["train-teacher", "cache-logits", "init-student", "train-student", "evaluate", "report"]
    assert [config.output for config in stages["train-student"]] == ["runs/out/student", "runs/out/control-labels"]
    assert stages["evaluate"][0].student == ("student=runs/out/student", "control-labels=runs/out/control-labels")
    assert stages["report"][0].control == ("control-labels=runs/out/control-labels",)
    control = stages["train-student"][1]
    assert (control.hard_weight, control.soft_weight) == (1, 0)
    assert sum(start.counts.classes.values()) == 80
    text = Path("out.yaml").read_text()
    assert "# Other columns, not read: Nr (integers, a different value on each row)." in text
    assert "3 classes: business 27, sport 27, film 26." in text
    assert "Only 5 labelled rows in test: an accuracy near 50% has a margin of error of 44 points." in " ".join(
        text.split()
    )
    assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize("names", [{"text": "text"}, {"text": "text", "label": "x"}])
def test_labelled_and_unlabelled_files_are_two_lines(encoder, names):
    write_csv("data/tickets.csv", rows(), {"text": "text", "label": "label"})
    write_csv("more/un[1].csv", rows(50, seed=1), names, ";")
    start, file, stages = init(dataset="data/tickets.csv", unlabelled=("more/un[1].csv",), model=encoder)
    assert file.shared["data"]["dataset"] == "."
    assert file.shared["data"]["data_files"] == ["train=data/tickets.csv", "train=more/un[[]1].csv"]
    assert Path("out.yaml").read_text().count("      - ") == 2
    assert "      - more/un[[]1].csv  # 50 rows without a label\n" in Path("out.yaml").read_text()
    assert stages["cache-logits"][0].unlabelled == ()
    assert start.counts.splits["train"].rows + start.counts.splits["test"].rows == 130
    assert start.has_unlabelled
    assert sum(start.counts.classes.values()) == 80
    assert [config.hard_labels for config in stages["train-student"]] == ["data", "data", "teacher"]
    assert start.counts.splits["test"].labelled == start.counts.splits["test"].rows


def test_unlabelled_rows_whose_labels_are_not_to_be_read(encoder):
    write_csv("tickets.csv", rows(), {"text": "text", "label": "label"})
    write_csv("more.csv", rows(50, seed=1), {"label": "label", "text": "text"})
    start, _, stages = init(dataset="tickets.csv", unlabelled=("more.csv",), model=encoder)
    assert stages["cache-logits"][0].unlabelled == ("more.csv",)
    assert stages["cache-logits"][0].data.dataset == "tickets.csv"
    assert sum(start.counts.classes.values()) == 80


@pytest.mark.parametrize("order", [1, -1])
def test_labels_that_only_some_parquet_files_have(encoder, order):
    names = ["a.parquet", "b.parquet"][::order]
    Path("data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows()), f"data/{names[0]}")
    pq.write_table(pa.Table.from_pylist([{"text": row["text"]} for row in rows(50, seed=1)]), f"data/{names[1]}")
    start, _, _ = init(dataset="data/*.parquet", model=encoder)
    assert start.roles.label == "label"
    assert sum(start.counts.classes.values()) == 80


def test_a_directory_of_splits_in_parquet_with_classes_as_numbers(encoder):
    Path("data").mkdir()
    for split, count in (("train", 80), ("test", 30)):
        table = pa.Table.from_pylist([{**row, "label": NAMES.index(row["label"])} for row in rows(count, seed=count)])
        pq.write_table(table, f"data/{split}.parquet")
    start, _, stages = init(dataset="data", model=encoder)
    data = stages["cache-logits"][0].data
    assert (data.dataset, data.data_files, data.holdout) == ("data", (), 0.0)
    assert start.counts.classes == {"0": 37, "1": 37, "2": 36}
    assert not start.counts.shared


@pytest.mark.parametrize("unlabelled", [(), ("more.csv",)])
def test_a_test_split_without_labels_is_read_with_train(encoder, unlabelled):
    write_csv("data/train.csv", rows(), {"text": "text", "label": "label"})
    write_csv("data/test.csv", rows(40, seed=1), {"text": "text"})
    write_csv("more.csv", rows(20, seed=2), {"text": "text"})
    start, _, stages = init(dataset="data", model=encoder, unlabelled=unlabelled)
    data = stages["cache-logits"][0].data
    files = {f"train={name}" for name in ("train.csv", "test.csv", *[f"../{name}" for name in unlabelled])}
    assert set(data.data_files) == files
    assert data.holdout == 0.1
    assert start.counts.splits["test"].labelled == start.counts.splits["test"].rows
    assert "The split test has no labels to measure with" in Path("out.yaml").read_text()


def test_validation_and_test_are_kept_and_shared_texts_said(encoder):
    same = rows(30, seed=5)
    for split, found in (("train", rows()), ("validation", same), ("test", same)):
        write_jsonl(f"data/{split}.jsonl", found)
    start, _, stages = init(dataset="data", model=encoder)
    assert stages["evaluate"][0].split == "test"
    assert start.counts.shared == {"validation, test": 30}
    assert "Caution: equal inputs in both of the splits validation, test: 30." in Path("out.yaml").read_text()


def test_a_saved_data_set_whose_test_labels_are_hidden(encoder):
    found = {split: datasets.Dataset.from_list(rows(60, seed=i)) for i, split in enumerate(["train", "validation"])}
    found["test"] = datasets.Dataset.from_list([{**row, "label": None} for row in rows(30, seed=7)])
    datasets.DatasetDict(found).save_to_disk("saved")
    _, _, stages = init(dataset="saved", model=encoder)
    assert stages["cache-logits"][0].data.split == ("train", "validation")
    assert stages["evaluate"][0].split == "validation"


@pytest.fixture
def language_model(lm_tokenizer, save_teacher) -> str:
    lm_tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    try:
        save_teacher(tiny_model("gpt2", len(lm_tokenizer)), lm_tokenizer, "lm")
    finally:
        lm_tokenizer.chat_template = None
    return "lm"


def test_chats(language_model):
    found = [
        [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}] for row in rows()
    ]
    write_jsonl("chats.jsonl", [{"messages": turns, "topic": turns[1]["content"]} for turns in found])
    with pytest.raises(MisuseError, match="column 'messages' holds chats: a language model needs its teacher named"):
        run(InitConfig(dataset="chats.jsonl", output="out.yaml"))
    start, file, stages = init(dataset="chats.jsonl", teacher=language_model)
    assert file.shared["task"] == "causal-lm"
    assert stages["cache-logits"][0].data.messages_column == "messages"
    assert "train-teacher" not in stages
    assert stages["init-student"][0].teacher == stages["cache-logits"][0].teacher == "lm"
    assert [config.soft_weight == 0 for config in stages["train-student"]] == [False, True]
    assert start.lengths.is_counted


def test_prompts_and_completions(language_model):
    write_jsonl("pairs.jsonl", [{"prompt": row["text"], "completion": row["label"]} for row in rows()])
    _, _, stages = init(dataset="pairs.jsonl", model=language_model)
    data = stages["train-teacher"][0].data
    assert (data.prompt_column, data.completion_column) == ("prompt", "completion")


def test_documents_are_read_in_pieces(language_model):
    write_jsonl("docs.jsonl", [{"text": f"{i} " + "the cat sat " * (100 if i % 10 else 2)} for i in range(40)])
    start, _, stages = init(dataset="docs.jsonl", teacher=language_model)  # a language model determines the task
    assert stages["cache-logits"][0].task == "causal-lm"
    assert start.lengths.chosen == 128
    assert start.lengths.mean > 128
    assert 0.8 < start.lengths.cut < 1
    assert "of the rows are read in several pieces" in " ".join(Path("out.yaml").read_text().replace("# ", "").split())


def test_a_classifier_that_needs_no_labels(bert_tokenizer, save_teacher):
    save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=3), bert_tokenizer)
    write_csv("texts.csv", rows(), {"text": "text"})
    _, _, stages = init(dataset="texts.csv", teacher="teacher")
    assert [config.hard_labels for config in stages["train-student"]] == ["data", "teacher"]
    assert "report" not in stages
    write_csv("texts.csv", rows(), {"text": "text", "label": "label"})
    with pytest.raises(SourceError, match=r"unknown label '.*'; expected one of LABEL_0, .*--label-map"):
        run(InitConfig(dataset="texts.csv", teacher="teacher", output="other.yaml"))
    mapped = tuple(f"{name}=LABEL_{i}" for i, name in enumerate(NAMES))
    run(InitConfig(dataset="texts.csv", teacher="teacher", output="other.yaml", label_map=mapped))
    assert next(stage_configs(load_config("other.yaml")))[1].data.label_map == mapped


@pytest.mark.parametrize(("text", "multilingual"), [("it is", False), ("schöne Grüße", True)])
def test_without_the_hub_the_lengths_are_estimated(text, multilingual):
    found = [{**row, "text": f"{text} {row['text']}"} for row in rows()]
    write_jsonl("d.jsonl", found)
    start, _, stages = init(dataset="d.jsonl")
    assert ("multilingual" in stages["train-teacher"][0].model) == multilingual
    assert not start.lengths.is_counted
    assert start.lengths.chosen % 16 == 0
    text = Path("out.yaml").read_text()
    assert "estimated from characters" in text
    assert "Times are rough" in text
    assert re.search(r"^# Takes .*\(.* over \d+ labelled rows\)\.\ntrain-teacher:", text, re.MULTILINE)


def test_rare_classes_empty_and_repeated_texts_are_said(encoder):
    found = [*rows(), *rows(4), {"text": "", "label": "film"}, {"text": "a rare one here", "label": "other: \n# x"}]
    write_csv("d.csv", found, {"text": "text", "label": "label"})
    start, _, stages = init(dataset="d.csv", model=encoder)
    splits = start.counts.splits.values()
    assert sum(split.empty for split in splits) == 1
    assert sum(split.repeated for split in splits) == 4
    assert start.counts.rare == ("other: \n# x",)
    assert "Caution: fewer than 5 labelled rows in train: other: x;" in said()
    assert stages["train-teacher"][0].on_bad_row == stages["cache-logits"][0].on_bad_row == "skip"


def said() -> str:
    """Return the comments of the file on one line."""
    return " ".join(Path("out.yaml").read_text().replace("# ", "").split())


@pytest.mark.parametrize("kind", [int, float])
def test_numbers_are_class_ids(encoder, kind):
    write_jsonl("d.jsonl", [{**row, "label": kind(1 + i % 5)} for i, row in enumerate(rows())])
    start, _, _ = init(dataset="d.jsonl", model=encoder)
    assert start.counts.rare == ()
    assert "6 classes (1 without a row, numbers being class ids from 0): 1 16," in said()
    write_jsonl("d.jsonl", [{**row, "label": kind(-1 + i % 3)} for i, row in enumerate(rows())])
    init(dataset="d.jsonl", model=encoder, overwrite=True)
    assert "Caution: -1 on 27 rows means: no label." in said()
    write_jsonl("d.jsonl", [{**row, "label": kind(100 + 100 * (i % 3))} for i, row in enumerate(rows())])
    with pytest.raises(
        SourceError, match="found only 100, 200, 300, which would make 301 classes; write names instead"
    ):
        init(dataset="d.jsonl", model=encoder, overwrite=True)


def test_what_may_be_a_mistake_is_said(encoder):
    found = [{"question": row["text"], "label": row["label"]} for row in rows()]
    for i, row in enumerate(found):
        row["context"] = f"{row['question']} again and more of it"
        row["label"] = "Film " if i % 15 == 2 else row["label"]
    write_jsonl("d.jsonl", found)
    init(dataset="d.jsonl", model=encoder, text_column="question")
    assert "Caution: 'film' and 'Film ' differ in case or outer spaces alone and are separate classes" in said()
    assert "to join them: --label-map 'Film =film'." in said()
    assert (
        "Caution: column 'context' also holds text, which is not read; --text-pair-column context reads both." in said()
    )
    joined, _, _ = init(
        dataset="d.jsonl",
        model=encoder,
        text_column="question",
        text_pair_column="context",
        label_map=("Film =film",),
        overwrite=True,
    )
    assert joined.counts.classes == {"business": 27, "film": 26, "sport": 27}
    assert "Caution" not in said()


def test_long_rows_are_cut_so_that_most_are_whole(encoder):
    long = [{"text": " ".join(["the"] * n), "label": "ab"[n % 2]} for n in [*[20, 21] * 45, *[30] * 6, *[500] * 4]]
    write_jsonl("d.jsonl", [{**row, "text": f"{row['text']} {i}"} for i, row in enumerate(long)])
    start, _, _ = init(dataset="d.jsonl", model=encoder)
    assert start.lengths.chosen == 48
    assert start.lengths.longest > 500
    assert 0 < start.lengths.cut < 0.05


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"dataset": "absent.csv"}, SourceError, "absent.csv: no such file or directory"),
        ({"dataset": "empty.csv"}, SourceError, "empty.csv: no rows"),
        ({"dataset": "header.csv"}, SourceError, "header.csv: no rows"),
        ({"dataset": "few.csv"}, SourceError, "few.csv: 9 rows are too few to set some aside as test"),
        ({"dataset": "d.csv", "output": "there.yaml"}, MisuseError, "there.yaml: is there already; .*--overwrite"),
        ({"dataset": "d.csv", "output": "d.csv"}, MisuseError, "expected the name of a YAML file"),
        (
            {"dataset": "d.csv", "unlabelled": ("few.jsonl",)},
            SourceError,
            "few.jsonl: --unlabelled: no column 'text', .*; found body; rename",
        ),
        (
            {"dataset": "mixed/*.csv"},
            SourceError,
            r"which is which .*\(softlabel init has no --data-files: name files after",
        ),
        ({"dataset": "d.csv", "unlabelled": ("absent.csv",)}, SourceError, "absent.csv: no such file"),
        ({"dataset": "d.csv", "model": "./absent"}, PipelineError, "./absent: no such directory"),
        ({"dataset": "blank.jsonl"}, SourceError, "column 'label' holds an empty text, .* write null"),
        ({"dataset": "latin.csv"}, SourceError, "latin.csv: cannot be read as csv: .*; save it as UTF-8"),
    ],
)
def test_what_cannot_be_is_one_line(settings, kind, message):
    write_csv("d.csv", rows(), {"text": "text", "label": "label"})
    for name in ("train", "others"):
        write_csv(f"mixed/{name}.csv", rows(), {"text": "text", "label": "label"})
    write_csv("few.csv", rows(9), {"text": "text", "label": "label"})
    write_jsonl("few.jsonl", [{"body": "x"}])
    write_jsonl("blank.jsonl", [*rows(), {"text": "x", "label": ""}])
    Path("latin.csv").write_bytes("text,label\nfür,a\n".encode("latin-1"))
    Path("empty.csv").write_text("")
    Path("header.csv").write_text("text,label\n")
    Path("there.yaml").write_text("task: causal-lm\n")
    with pytest.raises(kind, match=message) as caught:
        run(InitConfig(**{"output": "out.yaml", **settings}))
    assert "\n" not in str(caught.value)
    assert not Path("out.yaml").exists()


def test_from_a_file_to_an_evaluation(encoder):
    found = [*rows(90), {"text": "", "label": "film"}]
    write_csv("tickets.csv", found, {"text": "Ticket Body", "label": "Kategorie"}, ";", "\ufeff")
    write_csv("more.csv", rows(40, seed=1), {"text": "Ticket Body"})
    call = CliRunner()
    flags = ["--dataset", "tickets.csv", "--unlabelled", "more.csv", "--model", encoder, "--output", "distil.yaml"]
    done = call.invoke(main, ["init", *flags], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "column 'Kategorie': 3 classes: film 31, business 30, sport 30." in done.stdout
    assert "of these, 40 of more.csv without a label" in done.stdout
    assert done.stdout.endswith("    softlabel run distil.yaml\n")
    config = yaml.safe_load(Path("distil.yaml").read_text())
    for section in (config["train-teacher"], *config["train-student"]):
        section["max_steps"] = 2
    Path("distil.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    done = call.invoke(main, ["run", "distil.yaml", "--through", "evaluate"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    evaluation = json.loads(Path("runs/distil/evaluation.json").read_text())
    students = ["student", "control-labels", "control-teacher-labels"]
    assert [student["name"] for student in evaluation["students"]] == students


def test_help_has_it_first_and_no_section_of_a_file():
    text = CliRunner().invoke(main, ["--help"]).output
    assert text.index("  init ") < text.index("  train-teacher ")
    assert "--config" not in CliRunner().invoke(main, ["init", "--help"]).output
    done = CliRunner().invoke(main, ["init"])
    assert done.exit_code == 2
    assert done.stderr == "Error: missing --dataset, --output; give the flag\n"


def test_the_screen_says_where_test_went_and_quotes_the_file(encoder):
    write_csv("data/train.csv", rows(), {"text": "text", "label": "label"})
    write_csv("data/test.csv", rows(40, seed=1), {"text": "text"})
    done = CliRunner().invoke(main, ["init", "--dataset", "data", "--model", encoder, "--output", "my file.yaml"])
    assert done.exit_code == 0, done.output
    assert "The split test has no labels to measure with: its rows are read with those of train." in " ".join(
        done.stdout.split()
    )
    assert done.stdout.endswith("    softlabel run 'my file.yaml'\n")


@pytest.mark.parametrize(("other", "what"), [("text_column", "text"), ("label_column", "label")])
def test_a_pair_is_two_columns(other, what):
    with pytest.raises(MisuseError, match=f"--text-pair-column x: is the {what} column too; name another"):
        InitConfig(dataset="d.csv", output="out.yaml", text_pair_column="x", **{other: "x"})
