"""Make the ranking demo's data: `python -m data.bbc_ranking.prepare`.

A list has the headline of a BBC article and eight passages: one of that article, the only relevant
one, three of other articles on its topic, and four on other topics. Lists use only articles of
their own split of `data/bbc`. The labelled training lists are made from the first 400 training
articles, and the unlabelled lists from the others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from data.bbc.articles import Article, load_articles, split_articles, write_rows

HEADLINE, PASSAGE = 10, 32
"""Maximum words of a headline, and words of a passage."""
NEAR, FAR = 3, 4
NUM_LABELLED = 400


def passage(article: Article, rng: random.Random) -> str:
    """Return words after the first sentences, which repeat the headline."""
    words = article.text.split()
    start = rng.randrange(40, max(41, min(len(words) - PASSAGE, 160)))
    return " ".join(words[start : start + PASSAGE])


def lists(articles: Sequence[Article], rng: random.Random, labelled: int) -> Iterator[dict[str, str | None]]:
    """Yield the rows of one list after another, with the passages of a list in random order.

    Args:
        labelled: how many of the first lists have labels.
    """
    long = [article for article in articles if len(article.text.split()) > 40 + PASSAGE]
    for number, article in enumerate(long):
        near = [other for other in long if other.topic == article.topic and other is not article]
        far = [other for other in long if other.topic != article.topic]
        found = [(article, 1), *((other, 0) for other in [*rng.sample(near, NEAR), *rng.sample(far, FAR)])]
        rng.shuffle(found)
        headline = " ".join(article.text.split("\n")[0].split()[:HEADLINE])
        for other, relevance in found:
            yield {
                "list": article.id,
                "headline": headline,
                "passage": passage(other, rng),
                "relevance": relevance if number < labelled else None,  # type: ignore[dict-item]
            }


@click.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("data/bbc_ranking"),
    show_default=True,
    help="Folder to write to.",
)
def main(output: Path) -> None:
    """Write the three splits of the ranking demo."""
    rng, split = random.Random(0), split_articles(load_articles())
    parts = {"train": (split.train, NUM_LABELLED), "validation": (split.validation, 1000), "test": (split.test, 1000)}
    for name, (articles, labelled) in parts.items():
        write_rows(output / f"{name}.jsonl", lists(articles, rng, labelled))


if __name__ == "__main__":
    main()
