"""Run the README's commands as a new user would, on four data sets with their own column names.

    make first-hour                (or: python -m benchmarks.first_hour)

No flag sets a training option: teacher, student and control use the defaults. The control has the
same initial weights and settings as the student, and learns the hard labels alone.
`data/first_hour/prepare.py` writes the files of each data set; `validation.csv`, which the defaults
were derived on, is not read. Finished commands are not repeated, and the results are written to
`first-hour.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

ENCODER = "data/bbc/minilm"
#: Text column, label column and `--max-length`; None: the flag is not passed.
DATA: dict[str, tuple[str, str, int | None]] = {
    "news": ("Headline & Text", "Topic", 64),
    "sentiment": ("tweet_body", "Feeling (majority)", None),
    "tickets": ("Ticket Body", "Queue", None),
    "dialogue": ("utterance", "subject_name", None),
}


def commands(name: str, folder: Path) -> dict[str, list[str]]:
    """Return the commands by the output that they create."""
    text, label, length = DATA[name]
    source = Path("data/first_hour", name)
    data = ["--task", "sequence-classification", "--dataset", str(source)]
    data += ["--data-files", "train=train.csv", "--data-files", "test=test.csv"]
    data += ["--text-column", text, "--label-column", label]
    if length is not None:
        data += ["--max-length", str(length)]
    more = source / "unlabelled.csv"
    unlabelled = ["--unlabelled", str(more)] if more.is_file() else []
    teacher, cache, start = (str(folder / part) for part in ("teacher", "cache", "student-init"))
    train = ["train-student", "--cache", cache, "--student", start, "--output"]
    control = ["--hard-weight", "1", "--soft-weight", "0"]
    students = ["--student", str(folder / "student"), "--student", str(folder / "control")]
    return {
        "teacher": ["train-teacher", *data, "--model", ENCODER, "--output", teacher],
        "cache": ["cache-logits", *data, *unlabelled, "--teacher", teacher, "--output", cache],
        "student-init": ["init-student", "--teacher", teacher, "--output", start],
        "student": [*train, str(folder / "student")],
        "control": [*train, str(folder / "control"), *control],
        "evaluation": ["evaluate", "--cache", cache, *students, "--output", str(folder)],
    }


def run(name: str, folder: Path) -> dict[str, Any]:
    """Run the unfinished commands of a data set, and return its results."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "seconds.json"
    seconds: dict[str, float] = json.loads(kept.read_text()) if kept.is_file() else {}
    for output, command in commands(name, folder).items():
        if output in seconds:
            continue
        started = time.monotonic()
        shown = " ".join(f'"{word}"' if " " in word else word for word in command)
        click.echo(f"$ softlabel {shown}")
        subprocess.run([sys.executable, "-m", "pipeline", *command], check=True, env={**os.environ})
        seconds[output] = round(time.monotonic() - started, 1)
        kept.write_text(json.dumps(seconds) + "\n")
    report = json.loads((folder / "evaluation.json").read_text())
    accuracy = {line["name"]: line["metrics"]["accuracy"] for line in report["students"]}
    teacher = report["teacher"]["metrics"]["accuracy"]
    result = json.loads((folder / "student" / "distillation.json").read_text())
    return {
        "teacher": teacher,
        "student": accuracy["student"],
        "control": accuracy["control"],
        "retention": accuracy["student"] / teacher,
        "rows": report["rows"],
        "steps": result["steps"],
        "parameters": result["num_parameters"],
        "seconds_to_cache": seconds["teacher"] + seconds["cache"],
        "seconds_to_student": sum(seconds[part] for part in ("teacher", "cache", "student-init", "student")),
    }


@click.command()
@click.option("--data", multiple=True, default=tuple(DATA), type=click.Choice(list(DATA)))
@click.option("--output", default="runs/first-hour", type=click.Path(path_type=Path), show_default=True)
def main(data: tuple[str, ...], output: Path) -> None:
    """Run the commands on each data set, and print the retained share of teacher accuracy."""
    found = {name: run(name, output / name) for name in data}
    (output / "first-hour.json").write_text(json.dumps(found, indent=1) + "\n")
    click.echo("\naccuracy on the test split; minutes from the first command")
    click.echo(f"{'':<10}{'rows':>6}{'teacher':>9}{'student':>9}{'kept':>8}{'control':>9}{'cache':>8}{'student':>9}")
    for name, line in found.items():
        minutes = [line[key] / 60 for key in ("seconds_to_cache", "seconds_to_student")]
        click.echo(
            f"{name:<10}{line['rows']:>6}{line['teacher']:>9.1%}{line['student']:>9.1%}{line['retention']:>8.1%}"
            f"{line['control']:>9.1%}{minutes[0]:>8.1f}{minutes[1]:>9.1f}"
        )
    worst = min(found, key=lambda name: found[name]["retention"])
    beaten = [name for name, line in found.items() if line["student"] <= line["control"]]
    click.echo(f"least kept: {found[worst]['retention']:.1%} ({worst}); target 95%")
    click.echo(f"control not beaten on: {', '.join(beaten) or 'none'}")


if __name__ == "__main__":
    main()
