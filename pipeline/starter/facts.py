"""What each column of a data set looks like: one pass over its rows, or over a sample of many."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.sources.batches import UNREADABLE, read_rows
from pipeline.sources.columns import describe
from pipeline.sources.files.joined import JoinedRows, with_partial_columns
from pipeline.sources.files.parquet import ParquetRows

if TYPE_CHECKING:
    from pipeline.sources.files.joined import Rows

#: Rows of a split that are looked at.
MOST_ROWS = 100_000
_RUNS = 20
#: Different values of a column that are counted one by one.
_MOST_VALUES = 3000
_URL = re.compile(r"(https?://|www\.)\S+")
_DATE = re.compile(r"\d{1,4}[-./]\d{1,2}([-./]\d{1,4})?([T ,].*)?|\d{1,2}:\d{2}(:\d{2})?")
_CODE = re.compile(r"[\w.@+/-]*[\d_@-][\w.@+/-]*")


@dataclass(frozen=True, slots=True)
class Facts:
    """One column."""

    name: str
    kind: str
    """In words, as `describe` has them."""
    rows: int
    """Rows looked at."""
    filled: int
    """Of these, rows with a value that is not empty."""
    distinct: int
    values: tuple[tuple[object, int], ...]
    """The values and their counts, the most frequent first; empty where there are very many."""
    class_names: tuple[str, ...] | None
    """Of a column of class labels."""
    mean_chars: float
    mean_words: float
    looks: str
    """`url`, `date` or `code` where most values of a text column are that; else empty."""
    fractions: bool
    """Numbers, some of them with a fraction."""

    @property
    def is_scalar(self) -> bool:
        """One plain value a row."""
        return self.kind in ("text", "integers", "floats", "booleans", "class labels")

    @property
    def words(self) -> frozenset[str]:
        """The words of its name, in lower case."""
        spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", self.name)
        return frozenset(re.split(r"[\W_]+", spaced.lower()))


def column_facts(splits: Mapping[str, Rows]) -> dict[str, Facts]:
    """Column -> facts over all splits, in column order, partial columns included."""
    splits = {split: with_partial_columns(rows) for split, rows in splits.items()}
    kinds: dict[str, str] = {}
    names: dict[str, tuple[str, ...] | None] = {}
    for rows in splits.values():
        for name, feature in rows.features.items():
            if kinds.get(name, "nulls") == "nulls":
                kinds[name] = describe(feature)
                names[name] = getattr(feature, "names", None)
    plain = [name for name, kind in kinds.items() if not kind.startswith(("lists", "structs"))]
    tallies = {name: _Tally() for name in plain}
    total = 0
    for rows in splits.values():
        for row in sampled_rows(rows, plain):
            total += 1
            for name, tally in tallies.items():
                tally.add(row.get(name))
    return {
        name: tallies[name].facts(name, kind, total, names[name])
        if name in tallies
        else Facts(name, kind, total, total, total, (), None, 0.0, 0.0, "", False)
        for name, kind in kinds.items()
    }


def sampled_rows(rows: Rows, names: list[str], most: int = MOST_ROWS) -> Iterator[dict[str, object]]:
    """All rows of a split, or so many of them, from evenly spaced runs."""
    for part in sampled_ranges(rows, most):
        yield from read_rows(rows, names, part.start, part.stop)


def sampled_ranges(rows: Rows, most: int, runs: int = _RUNS) -> list[range]:
    """Evenly spaced runs of at most `most` rows in total, from few row groups in Parquet files."""
    count = len(rows)
    if count <= most:
        return [range(count)]
    if isinstance(rows, ParquetRows | JoinedRows):
        found = rows.few_groups(0, count, runs)
        each = max(1, most // len(found))
        return [range(part.start, min(part.stop, part.start + each)) for part in found]
    each = most // runs
    return [range(start, start + each) for start in (count * i // runs for i in range(runs))]


class _Tally:
    """The values of one column, as they come."""

    def __init__(self) -> None:
        self.filled = self.chars = self.spaces = self.texts = 0
        self.looks: Counter[str] = Counter()
        self.seen: set[int] = set()
        self.values: Counter[object] | None = Counter()
        self.fractions = False

    def add(self, value: object) -> None:
        """Count one value."""
        if value is None or value is UNREADABLE or value != value or (isinstance(value, str) and not value.strip()):
            return
        if isinstance(value, list | dict):  # rows of mixed types
            return
        self.filled += 1
        self.seen.add(hash(value))
        if self.values is not None:
            self.values[value] += 1
            if len(self.values) > _MOST_VALUES:
                self.values = None
        if isinstance(value, str):
            text = value.strip()
            self.texts += 1
            self.chars += len(text)
            self.spaces += len(text.split())
            self.looks[_look(text)] += 1
        elif isinstance(value, float):
            self.fractions = self.fractions or not value.is_integer()

    def facts(self, name: str, kind: str, rows: int, class_names: tuple[str, ...] | None) -> Facts:
        """What was counted."""
        look, count = self.looks.most_common(1)[0] if self.looks else ("", 0)
        return Facts(
            name=name,
            kind=kind,
            rows=rows,
            filled=self.filled,
            distinct=len(self.seen),
            values=tuple(self.values.most_common()) if self.values is not None else (),
            class_names=None if class_names is None else tuple(class_names),
            mean_chars=self.chars / max(1, self.texts),
            mean_words=self.spaces / max(1, self.texts),
            looks=look if count > 0.8 * self.filled else "",
            fractions=self.fractions,
        )


def _look(text: str) -> str:
    if len(text) > 300:
        return ""
    if _URL.fullmatch(text):
        return "url"
    if _DATE.fullmatch(text):
        return "date"
    return "code" if _CODE.fullmatch(text) else ""
