"""Split the training rows into rows to train on and rows to evaluate the student on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.cache.format.codec import hash_tokens
from pipeline.errors import TrainingError
from pipeline.records import is_known, offsets_of_counts
from pipeline.tasks import Task

#: Share of the rows that is held out, and the most rows and row groups; each evaluation decodes
#: those row groups.
_SHARE, MOST_ROWS, _MOST_GROUPS = 0.1, 2000, 64
#: 2^64 / the golden ratio: multiplying by it spreads integers over all 64 bits (Knuth's
#: multiplicative hashing).
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
#: The fewest rows from which metrics are meaningful.
FEWEST_ROWS = 20


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The rows of a training split that are evaluated on, and those that are trained on."""

    measured: np.ndarray
    """(rows,) bool: rows to evaluate on, spread evenly over the split."""
    left: np.ndarray
    """(rows,) bool: rows to train on. None has the same content as a row to evaluate on."""

    num_equal: int
    """Rows in neither set, since they have the same content as a row to evaluate on."""

    @property
    def num_measured(self) -> int:
        """The number of rows to evaluate on."""
        return int(self.measured.sum())


def which_labelled(rows: Any, task: Task) -> np.ndarray:
    """Return (rows,) bool: the rows of a split that have a hard label."""
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
    """Return `which_labelled` of a split on which only hard labels are trained.

    Raises:
        TrainingError: no row has a label.
    """
    labelled = which_labelled(rows, task)
    if not labelled.any():
        raise TrainingError(
            f"{where}: --soft-weight 0 trains on hard labels, and no row has one; give --soft-weight, or --hard-labels teacher"
        )
    return labelled


def hold_out(rows: Any, keep: np.ndarray | None, most: int = MOST_ROWS, *, by: str = "content_hash") -> HeldOut | None:
    """Choose rows to hold out by their content, so that no text is trained and evaluated on.

    Args:
        rows: a data set of a cache.
        keep: (rows,) bool: the rows that can be trained on; None: all.
        most: the most rows to hold out.
        by: a column with equal values for rows that must stay together: `score_group`: a list;
            `input_ids`: the same text with any labels; `position_labels`: the same text with any
            masks; `image_hash`: the same image with any crop; `source_row`: the windows of one
            text.

    Returns:
        None if a tenth of the rows to train on is fewer than `FEWEST_ROWS`, or if almost all rows
        have the same content.
    """
    if by == "source_row":  # spread, since adjacent rows may be of one class
        hashes = rows.column(by).astype(np.uint64) * _SPREAD
    else:
        hashes = rows.column(by) if by in ("content_hash", "score_group", "image_hash") else _hashes_of_tokens(rows, by)
    teach = np.ones(len(hashes), dtype=bool) if keep is None else keep
    count = min(int(teach.sum() * _SHARE), most)
    if count < FEWEST_ROWS:
        return None
    groups = len(rows.starts) - 1
    _, number, copies = np.unique(hashes, return_inverse=True, return_counts=True)
    seldom = copies[number] <= count  # holding out a text that is on most rows would leave few to train on
    near = np.zeros(len(hashes), dtype=bool)
    for group in np.unique(np.linspace(0, groups - 1, min(groups, _MOST_GROUPS)).round().astype(int)):
        near[rows.starts[group] : rows.starts[group + 1]] = True
    chosen = np.flatnonzero(near & teach & seldom)
    chosen = chosen[np.argsort(hashes[chosen], kind="stable")][:count]
    if len(chosen) < FEWEST_ROWS:
        return None
    measured = np.zeros(len(hashes), dtype=bool)
    measured[chosen] = True
    if by == "score_group":  # so that the last list is complete too
        measured = near & teach & np.isin(hashes, hashes[chosen])
    left = teach & ~np.isin(hashes, hashes[chosen])
    return HeldOut(measured, left, int(teach.sum() - measured.sum() - left.sum()))


def _hashes_of_tokens(rows: Any, by: str) -> np.ndarray:
    """Return (rows,) uint64 hashes of tokens; by `position_labels` of those before masking."""
    lists = rows.column("input_ids")
    if by == "position_labels":
        lists = [
            _put_back(*row)
            for row in zip(lists, rows.column("supervised"), rows.column("position_labels"), strict=True)
        ]
    return np.fromiter((hash_tokens(each, None) for each in lists), dtype=np.uint64, count=len(lists))


def _put_back(ids: Any, hidden: Any, labels: Any) -> np.ndarray:
    """Return (T,) tokens with the masked ones restored."""
    found = np.array(ids)
    found[np.asarray(hidden, dtype=bool)] = labels
    return found


def held_out_rows(held_out: HeldOut | None) -> dict[str, int]:
    """Return the number of held-out rows for the origin of a run; {} without held-out rows."""
    return {} if held_out is None else {"held_out": held_out.num_measured}
