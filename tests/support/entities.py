"""Sentences with people, places and firms.

The same word may be any of them; its kind follows from the words around it.
"""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset, DatasetDict

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG")
#: "bank" is both a place and a firm, "star" both a person and a firm.
ENTITIES = {
    "PER": [["star"], ["old", "star"], ["minister"]],
    "LOC": [["bank"], ["new", "bank"], ["river"]],
    "ORG": [["bank"], ["star"], ["market"]],
}
SENTENCES = ["the {PER} ran home", "{PER} sat under {LOC}", "over {LOC} and under {LOC}", "profit and {ORG}", "the dog ran",
             "{ORG} profit then vote", "{PER} sat on the mat and then ran over {LOC}"]  # fmt: skip


def entities(seed: int, count: int) -> dict[str, list[Any]]:
    """Return the columns `tokens` and `ner_tags` (names) of `count` sentences."""
    rng = random.Random(seed)
    rows: dict[str, list[Any]] = {"tokens": [], "ner_tags": []}
    for _ in range(count):
        words: list[str] = []
        tags: list[str] = []
        for piece in rng.choice(SENTENCES).split():
            kind = piece.strip("{}")
            entity = rng.choice(ENTITIES[kind]) if piece.startswith("{") else [piece]
            words += entity
            tags += ["O"] if piece == kind else [f"B-{kind}", *[f"I-{kind}"] * (len(entity) - 1)]
        rows["tokens"].append(words)
        rows["ner_tags"].append(tags)
    return rows


def sentences() -> DatasetDict:
    """Return 160 + 40 sentences; every eighth of the first 160 has no labels."""
    train, test = entities(0, 160), entities(1, 40)
    train["ner_tags"] = [None if i % 8 == 7 else tags for i, tags in enumerate(train["ner_tags"])]
    return DatasetDict({"train": Dataset.from_dict(train), "test": Dataset.from_dict(test)})
