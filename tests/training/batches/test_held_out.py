"""Held-out rows share no content with training rows and are evenly spread."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.errors import TrainingError
from pipeline.tasks import get_task
from pipeline.training.batches.held_out import FEWEST_ROWS, hold_out, labelled_rows

CLASSES = get_task("sequence-classification")


def rows_of(hashes: np.ndarray, size: int, labels: np.ndarray | None = None) -> SimpleNamespace:
    """Return a data set with row groups of one size."""
    columns = {"content_hash": hashes, "label": labels}
    starts = np.append(np.arange(0, len(hashes), size), len(hashes))
    return SimpleNamespace(column=columns.__getitem__, starts=starts)


def hashes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


@pytest.mark.parametrize(("count", "size"), [(200, 7), (1000, 1000), (5000, 10)])
def test_a_tenth_is_held_out_and_the_rest_is_learnt(count, size):
    found = hold_out(rows_of(hashes(count), size), None)
    assert found.num_measured == count // 10
    assert np.array_equal(found.left, ~found.measured)


def test_no_content_is_on_both_sides():
    twice = np.concatenate([hashes(300), hashes(300)])
    found = hold_out(rows_of(twice, 50), None)
    assert not set(twice[found.measured].tolist()) & set(twice[found.left].tolist())
    assert found.num_measured == 60
    assert found.left.sum() == 600 - 2 * len(set(twice[found.measured].tolist()))


def test_rows_that_do_not_teach_are_neither_measured_nor_learnt():
    keep = np.arange(1000) % 3 == 0
    found = hold_out(rows_of(hashes(1000), 100), keep)
    assert found.num_measured == 33
    assert not (found.measured & ~keep).any()
    assert not (found.left & ~keep).any()


def test_few_row_groups_are_decoded_of_many_and_they_are_spread():
    found = hold_out(rows_of(hashes(100_000), 100), None)
    assert found.num_measured == 2000
    groups = np.unique(np.flatnonzero(found.measured) // 100)
    assert len(groups) <= 64
    assert groups[0] < 50
    assert groups[-1] >= 950
    assert hold_out(rows_of(hashes(100_000), 100), None, 300).num_measured == 300


def test_the_choice_follows_the_content_and_not_the_place():
    """Adding or shuffling rows does not change the choice among the others."""
    content = hashes(400)
    order = np.random.default_rng(1).permutation(400)
    first, second = hold_out(rows_of(content, 40), None), hold_out(rows_of(content[order], 40), None)
    assert set(content[first.measured].tolist()) == set(content[order][second.measured].tolist())


def test_too_few_rows_are_not_cut_in_two():
    assert hold_out(rows_of(hashes(10 * FEWEST_ROWS - 1), 50), None) is None
    assert hold_out(rows_of(hashes(1000), 50), np.arange(1000) < 50) is None


def test_a_text_on_most_rows_is_learnt_and_not_held_out():
    many = np.concatenate([np.full(600, hashes(1)[0]), hashes(400, seed=1)])
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(1000)
        found = hold_out(rows_of(many[order], 50), None)
        assert found.left.sum() >= 850
        assert found.num_measured + found.left.sum() + found.num_equal == 1000
    assert hold_out(rows_of(np.full(1000, hashes(1)[0]), 50), None) is None


def test_labels_alone_need_a_label():
    labels = np.array([1.0, np.nan, 0.0])
    assert labelled_rows(rows_of(hashes(3), 2, labels), CLASSES, "cache").tolist() == [True, False, True]
    with pytest.raises(TrainingError, match="no row has one"):
        labelled_rows(rows_of(hashes(3), 2, np.full(3, np.nan)), CLASSES, "cache")
