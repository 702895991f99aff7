"""Make the score demo's data: `python -m data.bbc_shares.prepare`.

A text joins the beginnings of one to four BBC articles, cut to different lengths; its scores are
the percentages of its words on each of the five topics. Texts use only articles of their own split
of `data/bbc`. The labelled training texts are made from the first 400 training articles, and the
unlabelled texts from the others.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from data.bbc.articles import Article, load_articles, split_articles

LENGTHS = (8, 16, 24, 32)
"""Possible numbers of words taken from an article."""
MOST_WORDS = 64
TOPICS = ("business", "entertainment", "politics", "sports", "tech")
NUM_LABELLED, NUM_UNLABELLED, NUM_VALIDATION, NUM_TEST = 400, 1600, 200, 400
NUM_ARTICLES = 400


def texts(articles: Sequence[Article], count: int, rng: random.Random, *, labelled: bool = True) -> Iterator[str]:
    """Yield `count` texts with the percentage of each topic as JSON lines."""
    for _ in range(count):
        words: list[str] = []
        topics: list[str] = []
        for article in rng.sample(articles, rng.randint(1, 4)):
            part = article.text.split()[: rng.choice(LENGTHS)]
            words += part
            topics += [article.topic] * len(part)
        words, topics = words[:MOST_WORDS], topics[:MOST_WORDS]
        shares = [round(100 * topics.count(topic) / len(topics), 1) for topic in TOPICS]
        yield json.dumps({"text": " ".join(words), "shares": shares if labelled else None}) + "\n"


@click.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("data/bbc_shares"),
    show_default=True,
    help="Folder to write to.",
)
def main(output: Path) -> None:
    """Write the three splits of the score demo."""
    rng, split = random.Random(0), split_articles(load_articles())
    train = [
        *texts(split.train[:NUM_ARTICLES], NUM_LABELLED, rng),
        *texts(split.train[NUM_ARTICLES:], NUM_UNLABELLED, rng, labelled=False),
    ]
    parts = {
        "train": train,
        "validation": texts(split.validation, NUM_VALIDATION, rng),
        "test": texts(split.test, NUM_TEST, rng),
    }
    for name, lines in parts.items():
        (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
