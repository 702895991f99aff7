"""Properties of each column of a data set, from one pass over its rows or a sample of them."""

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

#: Maximum number of rows that are read per split.
MOST_ROWS = 100_000
_RUNS = 20
#: Maximum number of distinct values of a column that are counted.
_MOST_VALUES = 3000
_URL = re.compile(r"(https?://|www\.)\S+")
_DATE = re.compile(r"\d{1,4}[-./]\d{1,2}([-./]\d{1,4})?([T ,].*)?|\d{1,2}:\d{2}(:\d{2})?")
_CODE = re.compile(r"[\w.@+/-]*[\d_@-][\w.@+/-]*")


@dataclass(frozen=True, slots=True)
class Facts:
    """Properties of one column."""

    name: str
    kind: str
    """The type of the values in words, from `describe`."""
    rows: int
    """Number of rows that were read."""
    filled: int
    """Number of read rows with a non-empty value."""
    distinct: int
    values: tuple[tuple[object, int], ...]
    """Values and their counts, the most frequent first; empty if there are too many values."""
    class_names: tuple[str, ...] | None
    """Class names of a column of class labels; None for other columns."""
    mean_chars: float
    mean_words: float
    looks: str
    """`url`, `date` or `code` if most values of a text column are; else empty."""
    fractions: bool
    """Whether values are numbers and some have a fraction."""

    @property
    def is_scalar(self) -> bool:
        """Whether each row has a single plain value."""
        return self.kind in ("text", "integers", "floats", "booleans", "class labels")

    @property
    def words(self) -> frozenset[str]:
        """The words of the column's name in lower case."""
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
    """All rows of a split, or at most `most` rows from evenly spaced runs."""
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
    """Accumulates the values of one column."""

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
        if isinstance(value, list | dict):  # a column of mixed types
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
        """The properties of the counted values."""
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
