"""Make the multi-label demo's data: `python -m data.bbc_several.prepare`.

A text joins the beginnings of one to three BBC articles, and its labels are their topics. Texts use
only articles of their own split of `data/bbc`. The labelled training texts are made from the first
400 training articles, and the unlabelled texts from the others.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import click

from data.bbc.articles import Article, load_articles, split_articles

WORDS = 18
NUM_LABELLED, NUM_UNLABELLED, NUM_VALIDATION, NUM_TEST = 300, 1700, 200, 400
NUM_ARTICLES = 400


def texts(articles: Sequence[Article], count: int, rng: random.Random, *, labelled: bool = True) -> list[str]:
    """Return `count` texts with their topics as JSON lines."""
    found = []
    for _ in range(count):
        parts = rng.sample(articles, rng.choice([1, 2, 2, 3]))
        text = " ... ".join(" ".join(part.text.split()[:WORDS]) for part in parts)
        topics = sorted({part.topic for part in parts}) if labelled else None
        found.append(json.dumps({"text": text, "topics": topics}) + "\n")
    return found


@click.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("data/bbc_several"),
    show_default=True,
    help="Folder to write to.",
)
def main(output: Path) -> None:
    """Write the three splits of the multi-label demo."""
    rng, split = random.Random(0), split_articles(load_articles())
    train = texts(split.train[:NUM_ARTICLES], NUM_LABELLED, rng)
    train += texts(split.train[NUM_ARTICLES:], NUM_UNLABELLED, rng, labelled=False)
    parts = {
        "train": train,
        "validation": texts(split.validation, NUM_VALIDATION, rng),
        "test": texts(split.test, NUM_TEST, rng),
    }
    for name, lines in parts.items():
        (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
