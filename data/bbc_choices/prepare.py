"""Make the multiple-choice demo's data: `python -m data.bbc_choices.prepare`.

A row has the headline of a BBC article and four passages: one of that article, and three of other
articles on its topic. Rows use only articles of their own split of `data/bbc`. The labelled
training rows are made from the first 400 training articles, and the unlabelled rows from the
others, each with two sets of passages.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from data.bbc.articles import Article, load_articles, split_articles
from data.bbc_ranking.prepare import HEADLINE, PASSAGE, passage

OTHERS = 3
NUM_LABELLED = 400


def rows(articles: Sequence[Article], rng: random.Random, labelled: int) -> Iterator[str]:
    """Yield rows as JSON lines, with the passages in random order.

    Args:
        labelled: how many of the first rows have a label.
    """
    long = [article for article in articles if len(article.text.split()) > 40 + PASSAGE]
    for number, article in enumerate(long):
        near = [other for other in long if other.topic == article.topic and other is not article]
        found = [article, *rng.sample(near, OTHERS)]
        rng.shuffle(found)
        yield (
            json.dumps(
                {
                    "headline": " ".join(article.text.split("\n")[0].split()[:HEADLINE]),
                    "passages": [passage(other, rng) for other in found],
                    "right": found.index(article) if number < labelled else None,
                }
            )
            + "\n"
        )


@click.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("data/bbc_choices"),
    show_default=True,
    help="Folder to write to.",
)
def main(output: Path) -> None:
    """Write the three splits of the multiple-choice demo."""
    rng, split = random.Random(0), split_articles(load_articles())
    output.mkdir(parents=True, exist_ok=True)
    parts = {
        "train": [*rows(split.train, rng, NUM_LABELLED), *rows(split.train[NUM_LABELLED:], rng, 0)],
        "validation": rows(split.validation, rng, 1000),
        "test": rows(split.test, rng, 1000),
    }
    for name, lines in parts.items():
        (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
