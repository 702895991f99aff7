"""Read the rows of a split in batches, so that memory use does not grow with the data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from pipeline.sources.files.joined import JoinedRows
from pipeline.sources.files.parquet import ParquetRows

if TYPE_CHECKING:
    from datasets import Dataset

    from pipeline.sources.files.joined import Rows

#: Number of rows that are Python objects at the same time. At 256, slicing costs less than a tenth
#: of decoding.
BATCH_ROWS = 256

Row = dict[str, object]


_VIEWS: WeakKeyDictionary[Dataset, dict[tuple[str, ...], Dataset]] = WeakKeyDictionary()


class _Unreadable:
    def __repr__(self) -> str:
        return "UNREADABLE"


#: Replaces every value of a row with a string that is not valid UTF-8. Arrow files can contain such
#: strings; Python cannot decode them.
UNREADABLE: Final = _Unreadable()


def read_rows(dataset: Rows, names: Sequence[str], start: int = 0, stop: int | None = None) -> Iterator[Row]:
    """Yield the rows `[start, stop)` as Python objects, in order.

    Args:
        names: columns to read; the others are never decoded. Columns that the data set does not
            have are left out.

    Yields:
        One dictionary per row, by column name, whatever format the data set is set to.
    """
    stop = len(dataset) if stop is None else stop
    present = [name for name in dict.fromkeys(names) if name in dataset.column_names]
    if not present:
        yield from ({} for _ in range(start, stop))
        return
    if isinstance(dataset, JoinedRows):
        blank = dict.fromkeys(present)  # null for the columns that a part does not have
        for i, first, last in dataset.pieces(start, stop):
            own = [name for name in present if dataset.holds(i, name)]
            yield from ({**blank, **row} for row in read_rows(dataset.parts[i], own, first, last))
    elif isinstance(dataset, ParquetRows):
        for part in dataset.parts(present, start, stop):
            yield from _read(part, present, 0, len(part))
    else:
        yield from _read(_view(dataset, tuple(present)), present, start, stop)


def _read(plain: Dataset, present: Sequence[str], start: int, stop: int) -> Iterator[Row]:
    for first in range(start, stop, BATCH_ROWS):
        last = min(first + BATCH_ROWS, stop)
        try:
            columns = plain[first:last]
        except UnicodeDecodeError:
            yield from (_read_row(plain, present, row) for row in range(first, last))
            continue
        for values in zip(*(columns[name] for name in present), strict=True):
            yield dict(zip(present, values, strict=True))


def _view(dataset: Dataset, names: tuple[str, ...]) -> Dataset:
    """Return a view of the data set that gives these columns as Python objects.

    The view is cached as long as the data set exists, since making one (with a fingerprint) costs
    more than reading a row.
    """
    views = _VIEWS.setdefault(dataset, {})
    if names not in views:
        views[names] = dataset.with_format(None, columns=list(names))
    return views[names]


def _read_row(plain: Dataset, names: Sequence[str], row: int) -> Row:
    try:
        return dict(plain[row])
    except UnicodeDecodeError:
        return dict.fromkeys(names, UNREADABLE)
