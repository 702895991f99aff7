"""Count rows, labels, empty and repeated texts of a data set whose columns are chosen."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import SourceError
from pipeline.sources import LabelMap, Source
from pipeline.sources.batches import read_rows
from pipeline.sources.columns import input_roles
from pipeline.sources.label_names import FEW_ROWS
from pipeline.starter.facts import sampled_ranges

#: Maximum number of rows that are read per split; a larger split is sampled.
MOST_ROWS = 500_000


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """Counts of one split; for a sampled split, all but `rows` are counts of the sample."""

    rows: int
    read: int
    labelled: int
    empty: int
    """Rows without an input, which no model can read."""
    repeated: int
    """Rows with the input of an earlier row."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts of all splits."""

    splits: Mapping[str, SplitCounts]
    classes: Mapping[str, int]
    """Class name -> number of labelled rows in all splits."""
    rare: tuple[str, ...]
    """Classes that have labelled rows, but fewer than `FEW_ROWS` in `train`."""
    shared: Mapping[str, int]
    """Pair of splits as "one, other" -> number of distinct inputs in both."""
    foreign_letters: float
    """Share of letters outside a to z."""


def count(source: Source, names: Sequence[str], label_map: Sequence[str]) -> Counts:
    """Count in one pass over the rows.

    Args:
        names: names of the classes; empty: no classes.

    Raises:
        SourceError: a label is not one of the classes.
    """
    labels = LabelMap.for_names(source, tuple(names), label_map) if names else None
    column = source.columns.label if names else None
    inputs = list(input_roles(source.columns).values())
    wanted = [name for role, name in input_roles(source.columns).items() if role != "prompt"]
    splits: dict[str, SplitCounts] = {}
    seen: dict[str, set[int]] = {}
    classes = Counter[int]()
    in_train = Counter[int]()
    letters = foreign = 0
    for split, rows in source.splits.items():
        read = labelled = empty = 0
        known = seen.setdefault(split, set())
        for part in sampled_ranges(rows, MOST_ROWS):
            for i, row in enumerate(read_rows(rows, [*inputs, *([column] if column else [])], part.start, part.stop)):
                read += 1
                if any(is_empty(row.get(name)) for name in wanted):
                    empty += 1
                else:
                    known.add(_hash([row.get(name) for name in inputs]))
                if read <= 1000:
                    text = "".join(v for name in inputs if isinstance(v := row.get(name), str))
                    letters += sum(map(str.isalpha, text))
                    foreign += sum(c.isalpha() and not c.isascii() for c in text)
                if labels is None or column is None:
                    continue
                value = row.get(column)
                if isinstance(value, str) and not value.strip():
                    raise SourceError(
                        f"{source.name}: split {split}, row {part.start + i}: column {column!r} holds an empty text, which "
                        "would be a class of its own; write null where a row has no label"
                    )
                found = labels.class_id(value, split=split, row=part.start + i)
                if found is not None:
                    labelled += 1
                    classes[found] += 1
                    in_train[found] += split == "train"
        splits[split] = SplitCounts(len(rows), read, labelled, empty, read - empty - len(known))
    shared = {
        f"{one}, {other}": number
        for one, other in itertools.combinations(seen, 2)
        if (number := len(seen[one] & seen[other]))
    }
    return Counts(
        splits=splits,
        classes={name: classes[i] for i, name in enumerate(names)},
        rare=tuple(name for i, name in enumerate(names) if classes[i] and in_train[i] < FEW_ROWS),
        shared=shared,
        foreign_letters=foreign / max(1, letters),
    )


def is_empty(value: object) -> bool:
    """Whether an input is empty for a model."""
    return value is None or value in ("", [])


def _hash(values: list[object]) -> int:
    only = values[0] if len(values) == 1 else values
    return hash(only if isinstance(only, str) else json.dumps(only, sort_keys=True, default=repr))
