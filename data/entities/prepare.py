"""Make the token-classification demo's data: `python -m data.entities.prepare`.

train.jsonl         3,000 sentences, of which 150 are labelled: those of 10 of the 30 patterns
validation.jsonl    300 sentences
test.jsonl          500 sentences; half of them use names that occur in no other split
"""

from __future__ import annotations

import json
from pathlib import Path

from data.entities.sentences import sentences

FOLDER = Path(__file__).parent
TRAIN, LABELLED, VALIDATION, TEST = 3000, 150, 300, 500
#: Labelled sentences use only these patterns, since real labels rarely cover all of the data.
PATTERNS_LABELLED = 10


def main() -> None:
    """Write the three splits of the token-classification demo."""
    labelled = sentences(0, LABELLED, patterns=PATTERNS_LABELLED)
    train: list[dict[str, object]] = [{"tokens": words, "ner_tags": tags} for words, tags in labelled]
    train += [{"tokens": words, "ner_tags": None} for words, _ in sentences(4, TRAIN - LABELLED)]
    validation = [{"tokens": words, "ner_tags": tags} for words, tags in sentences(1, VALIDATION)]
    halves = [*sentences(2, TEST // 2), *sentences(3, TEST // 2, new_names=True)]
    test = [{"tokens": words, "ner_tags": tags} for words, tags in halves]
    for split, rows in (("train", train), ("validation", validation), ("test", test)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (FOLDER / f"{split}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
