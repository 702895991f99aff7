"""Make the question-answering demo's data: `python -m data.bbc_cloze.prepare`.

A question is a sentence of a BBC article in which "who" replaces a name of two words. The text is
the part of the article around the sentence, and the answer is the name in it. Rows use only
articles of their own split of `data/bbc`. The labelled training rows are made from the first 400
training articles, and the unlabelled rows from the others.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from data.bbc.articles import Article, load_articles, split_articles

NUM_LABELLED, OF_AN_ARTICLE = 400, 2
CHARACTERS, QUESTION = 360, 120
"""Maximum characters of the text around a sentence, and of a question."""
_SENTENCE = re.compile(r"[^.?!\n]+[.?!]")
_NAME = re.compile(r"\b[A-Z][a-z]+ [A-Z][a-z]+\b")


def questions(article: Article, rng: random.Random) -> Iterator[dict[str, object]]:
    """Yield a row for each sentence that contains one name, not at its beginning."""
    for sentence in _SENTENCE.finditer(article.text):
        names = list(_NAME.finditer(sentence[0].strip()))
        if len(names) != 1 or names[0].start() < 10 or len(sentence[0]) > QUESTION:
            continue
        name, told = names[0][0], sentence[0].strip()
        start = max(0, sentence.start() - rng.randrange(CHARACTERS - len(sentence[0])))
        text = article.text[start : start + CHARACTERS].split(" ", 1)[-1].rsplit(" ", 1)[0]
        place = text.find(told)
        if place >= 0:
            yield {
                "question": told.replace(name, "who", 1),
                "text": text,
                "answers": {"text": [name], "answer_start": [place + names[0].start()]},
            }


def rows(articles: Sequence[Article], rng: random.Random, labelled: int) -> Iterator[str]:
    """Yield rows as JSON lines.

    Args:
        labelled: how many of the first articles have answers in their rows.
    """
    for number, article in enumerate(articles):
        found = list(questions(article, rng))
        for row in rng.sample(found, min(OF_AN_ARTICLE, len(found))):
            yield json.dumps(row if number < labelled else {**row, "answers": None}) + "\n"


@click.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("data/bbc_cloze"),
    show_default=True,
    help="Folder to write to.",
)
def main(output: Path) -> None:
    """Write the three splits of the question-answering demo."""
    rng, split = random.Random(0), split_articles(load_articles())
    output.mkdir(parents=True, exist_ok=True)
    parts = {
        "train": (split.train, NUM_LABELLED),
        "validation": (split.validation, 10_000),
        "test": (split.test, 10_000),
    }
    for name, (articles, labelled) in parts.items():
        (output / f"{name}.jsonl").write_text("".join(rows(articles, rng, labelled)), encoding="utf-8")


if __name__ == "__main__":
    main()
