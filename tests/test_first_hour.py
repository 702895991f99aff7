"""The first hour of a new user.

Runs the README's commands on a CSV with other column names and without training options.

`make first-hour` does the same with real data and a real encoder.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import random
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from datasets import Dataset, DatasetDict

from pipeline.cli import main
from tests.conftest import TOPICS, sentence, tiny_model

README = (Path(__file__).parents[1] / "README.md").read_text()
SECTION = README.partition("\n## Your own data\n")[2].partition("\n## ")[0]


def commands() -> dict[str, list[str]]:
    """Return name -> README command with a tiny encoder, and a control."""
    block = re.search(r"```bash\n(.*?)```", SECTION, re.S)
    lines = block[1].replace("\\\n", " ").strip().splitlines()
    assert [shlex.split(line)[1] for line in lines] == [
        "train-teacher", "cache-logits", "init-student", "train-student", "evaluate",
    ]  # fmt: skip
    words = [["encoder" if word == "bert-base-uncased" else word for word in shlex.split(line)[1:]] for line in lines]
    found = dict(zip(("teacher", "cache", "start", "student", "evaluation"), words, strict=True))
    control = ["runs/control" if word == "runs/student" else word for word in found["student"]]
    evaluation = found.pop("evaluation")
    found["control"] = [*control, "--hard-weight", "1", "--soft-weight", "0"]
    return {**found, "evaluation": [*evaluation, "--student", "runs/control", "--output", "runs"]}


def write(path: Path, count: int, seed: int, *, labelled: bool = True) -> None:
    """Write tickets with a number, a text of one topic and, if known, a queue."""
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["Ticket No", "Body of ticket", "Queue"][: 3 if labelled else 2])
        for i in range(count):
            topic = rng.choice(list(TOPICS))
            writer.writerow([1000 + i, sentence(rng, 12, topic), f"{topic} team"][: 3 if labelled else 2])


@pytest.fixture(scope="module")
def hour(tmp_path_factory, bert_tokenizer) -> tuple[Path, dict[str, str]]:
    """Run the commands; return their folder and the output of each."""
    folder = tmp_path_factory.mktemp("hour")
    write(folder / "tickets" / "train.csv", 300, 0)
    write(folder / "tickets" / "test.csv", 150, 1)
    write(folder / "more.csv", 300, 2, labelled=False)
    tiny_model("bert", len(bert_tokenizer), num_labels=2).bert.save_pretrained(folder / "encoder")
    bert_tokenizer.save_pretrained(folder / "encoder")
    shown = {}
    log = logging.getLogger("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, command in commands().items():
            said = io.StringIO()
            log.addHandler(handler := logging.StreamHandler(said))
            found = CliRunner().invoke(main, command)
            log.removeHandler(handler)
            assert found.exit_code == 0, (command, found.output)
            shown[name] = said.getvalue() + found.output
    return folder, shown


def test_the_student_keeps_most_of_its_teacher(hour):
    folder, _ = hour
    report = json.loads((folder / "runs" / "evaluation.json").read_text())
    teacher = report["teacher"]["metrics"]["accuracy"]
    student = report["students"][0]["metrics"]["accuracy"]
    assert teacher > 0.8
    assert student >= 0.95 * teacher


def test_every_metric_names_its_split_and_rows(hour):
    _, shown = hour
    assert re.search(
        r"accuracy [\d.]+%.* on test, 150 labelled rows; trained on train, 300 labelled rows", shown["teacher"]
    )
    assert "train: 600 rows, 300 labelled" in shown["cache"]
    assert "test: 150 rows, 150 labelled" in shown["cache"]
    held_out = r"on train \(held out\), \d+ rows"
    assert re.search(held_out, shown["student"])
    assert re.search(r"split test: 150 rows", shown["evaluation"])


def test_what_is_chosen_is_said_before_the_first_step(hour):
    _, shown = hour
    assert re.search(r"train-teacher teacher: learning rate \S+: random weights", shown["teacher"])
    assert re.search(r"train-teacher teacher: epochs \d+: 300 labelled rows", shown["teacher"])
    said = re.findall(r"^train-student student: (.*)$", shown["student"], re.MULTILINE)
    assert [line.split(" ")[0] for line in said] == ["loss", "learning", "batch", "steps", "early"]
    assert "layers copied from the teacher" in said[1]
    assert re.search(r"\d+ rows held out of train by content \(no split validation\)", said[-1])
    line = next(line for line in shown["student"].splitlines() if line.startswith("student: "))
    assert re.search(r"student: runs/student  \d+ steps of at most \d+ in \d+ s, the weights of step \d+ kept, ", line)


@pytest.mark.full
@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_python_of_the_pages_runs_on_what_the_commands_made(hour, page, capsys, monkeypatch):
    folder, _ = hour
    monkeypatch.chdir(folder)
    text = (Path(__file__).parents[1] / page).read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.S | re.M))
    code = code.replace("runs/", f"again/{page}/").replace(f"again/{page}/teacher", "runs/teacher")
    names = {"Body of ticket": "text", "Queue": "label"}
    splits = {name: Dataset.from_csv(f"tickets/{name}.csv").rename_columns(names) for name in ("train", "test")}
    exec(code, found := {"dataset": DatasetDict(splits)})
    shown = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"retention [\d.]+%, agreement [\d.]+%" if page == "README.md" else r"[01]\.\d+", shown)
    assert set(found["cache"].splits) == ({"train", "test"} if page == "README.md" else {"train"})


def test_the_sizes_of_the_student_are_said(hour):
    _, shown = hour
    assert re.search(r"[\d,]+ parameters, [\d.]+% of the teacher's [\d,]+; layers 0", shown["start"])
