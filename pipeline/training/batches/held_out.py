"""Which rows of a training split are learnt from, and which are left out of it to measure the student on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.cache.format.codec import hash_tokens
from pipeline.errors import TrainingError
from pipeline.records import is_known, offsets_of_counts
from pipeline.tasks import Task

#: A tenth of the rows is held out, at most so many, of at most so many row groups: those are
#: decoded for each evaluation.
_SHARE, MOST_ROWS, _MOST_GROUPS = 0.1, 2000, 64
#: 2^64 over the golden ratio, by which whole numbers are spread over all of 64 bits (Knuth's
#: multiplicative hashing).
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
#: With fewer, a measurement says nothing.
FEWEST_ROWS = 20


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The parts of a training split of which one is measured on."""

    measured: np.ndarray
    """(rows,) bool, spread evenly over the split."""
    left: np.ndarray
    """(rows,) bool: what is learnt from. No content is in both."""

    num_equal: int
    """Rows that are neither: their content is that of a row to measure on."""

    @property
    def num_measured(self) -> int:
        """Rows to measure on."""
        return int(self.measured.sum())


def which_labelled(rows: Any, task: Task) -> np.ndarray:
    """(rows,) bool: which rows of a split have a hard label."""
    if task.label_source == "row":
        labelled: np.ndarray = ~np.isnan(rows.column("label").astype(np.float64))
        return labelled
    if task.label_source == "positions":
        lists = rows.column("position_labels")
        starts = offsets_of_counts(np.fromiter(map(len, lists), dtype=np.int64, count=len(lists)))[:-1]
        found: np.ndarray = np.logical_or.reduceat(is_known(np.concatenate(lists)), starts)  # no row is empty
        return found
    return np.ones(len(rows), dtype=bool)


def labelled_rows(rows: Any, task: Task, where: str) -> np.ndarray:
    """`which_labelled`, of a split that is trained on hard labels alone.

    Raises:
        TrainingError: none.
    """
    labelled = which_labelled(rows, task)
    if not labelled.any():
        raise TrainingError(
            f"{where}: --soft-weight 0 trains on hard labels, and no row has one; give --soft-weight, or --hard-labels teacher"
        )
    return labelled


def hold_out(rows: Any, keep: np.ndarray | None, most: int = MOST_ROWS, *, by: str = "content_hash") -> HeldOut | None:
    """Choose rows by their content, so that the same text is never learnt and measured on.

    Args:
        rows: a data set of a cache.
        keep: (rows,) bool, the rows that teach; None: all.
        most: rows to hold out at most.
        by: the column whose value rows that belong together share, those of one list, say;
            `input_ids`: the same text, whatever its labels; `position_labels`: the same text,
            whatever its masks; `image_hash`: the same image, whatever its part; `source_row`: the
            windows of one text.

    Returns:
        None where a tenth of the rows that teach is fewer than `FEWEST_ROWS`, or all but few rows
            have the same content.
    """
    if by == "source_row":  # spread, since rows that lie together may be of one class
        hashes = rows.column(by).astype(np.uint64) * _SPREAD
    else:
        hashes = rows.column(by) if by in ("content_hash", "score_group", "image_hash") else _hashes_of_tokens(rows, by)
    teach = np.ones(len(hashes), dtype=bool) if keep is None else keep
    count = min(int(teach.sum() * _SHARE), most)
    if count < FEWEST_ROWS:
        return None
    groups = len(rows.starts) - 1
    _, number, copies = np.unique(hashes, return_inverse=True, return_counts=True)
    seldom = copies[number] <= count  # to hold out a text that is on most rows would leave few to learn from
    near = np.zeros(len(hashes), dtype=bool)
    for group in np.unique(np.linspace(0, groups - 1, min(groups, _MOST_GROUPS)).round().astype(int)):
        near[rows.starts[group] : rows.starts[group + 1]] = True
    chosen = np.flatnonzero(near & teach & seldom)
    chosen = chosen[np.argsort(hashes[chosen], kind="stable")][:count]
    if len(chosen) < FEWEST_ROWS:
        return None
    measured = np.zeros(len(hashes), dtype=bool)
    measured[chosen] = True
    if by == "score_group":  # the last list too is whole
        measured = near & teach & np.isin(hashes, hashes[chosen])
    left = teach & ~np.isin(hashes, hashes[chosen])
    return HeldOut(measured, left, int(teach.sum() - measured.sum() - left.sum()))


def _hashes_of_tokens(rows: Any, by: str) -> np.ndarray:
    """(rows,) uint64, with hidden tokens put back where asked for."""
    lists = rows.column("input_ids")
    if by == "position_labels":
        lists = [
            _put_back(*row)
            for row in zip(lists, rows.column("supervised"), rows.column("position_labels"), strict=True)
        ]
    return np.fromiter((hash_tokens(each, None) for each in lists), dtype=np.uint64, count=len(lists))


def _put_back(ids: Any, hidden: Any, labels: Any) -> np.ndarray:
    """(T,) the tokens before they were hidden."""
    found = np.array(ids)
    found[np.asarray(hidden, dtype=bool)] = labels
    return found


def held_out_rows(held_out: HeldOut | None) -> dict[str, int]:
    """For the origin of a run; older runs have none."""
    return {} if held_out is None else {"held_out": held_out.num_measured}
