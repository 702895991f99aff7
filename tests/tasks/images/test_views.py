"""Random crops of images: their position, distribution and determinism."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.records import Views
from pipeline.tasks.images.views import RATIOS, draw_view

MANY = 4000


def drawn(width: int, height: int, views: Views, count: int = MANY) -> np.ndarray:
    """Return the views, (count, 5)."""
    return np.stack([draw_view(width, height, views, place=("train", i, 0)) for i in range(count)])


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_part_lies_within_the_image(width, height, smallest, row):
    left, top, w, h, mirrored = draw_view(width, height, Views(1, smallest), place=("train", row, 0)).tolist()
    assert left >= 0
    assert top >= 0
    assert left + w <= width
    assert top + h <= height
    assert w > 0
    assert h > 0
    assert mirrored in (0, 1)


def test_areas_and_ratios_are_those_of_a_random_resized_crop():
    """The views of a large square image have the distribution of a random resized crop.

    Area shares are uniform, aspect ratios log-uniform, and half of the views are mirrored; each
    mean is within 4 standard errors.

    Some of the largest shares do not fit and are drawn again, so that only shares up to 3/4, which
    always fit, are compared.
    """
    found = drawn(1000, 1000, Views(1, 0.08))
    area, ratio = found[:, 2] * found[:, 3] / 1e6, np.log(found[:, 2] / found[:, 3])
    low, high = math.log(RATIOS[0]), math.log(RATIOS[1])
    inside = area < 0.75
    assert area.min() >= 0.079
    expected, error = (0.08 + 0.75) / 2, (0.75 - 0.08) / math.sqrt(12 * inside.sum())
    assert abs(area[inside].mean() - expected) < 4 * error
    assert abs(ratio[inside].mean()) < 4 * (high - low) / math.sqrt(12 * inside.sum())
    assert low - 0.01 <= ratio.min() <= ratio.max() <= high + 0.01
    assert abs(found[:, 4].mean() - 0.5) < 4 * 0.5 / math.sqrt(MANY)
    across = found[:, 0] / np.maximum(1000 - found[:, 2], 1)
    assert abs(across[inside].mean() - 0.5) < 4 / math.sqrt(12 * inside.sum())


def test_a_part_depends_on_seed_split_row_and_number_alone():
    def at(seed: int = 0, split: str = "train", row: int = 3, number: int = 1) -> list[int]:
        return draw_view(200, 100, Views(2, seed=seed), place=(split, row, number)).tolist()

    assert at() == at()
    others = [at(seed=1), at(split="test"), at(row=4), at(number=0)]
    assert all(other != at() for other in others)


def test_without_mirrors_none_is_mirrored_and_the_parts_stay():
    one, other = drawn(64, 48, Views(1, mirror=False), 200), drawn(64, 48, Views(1), 200)
    assert not one[:, 4].any()
    assert np.array_equal(one[:, :4], other[:, :4])


@pytest.mark.parametrize(("width", "height", "expected"), [(3000, 10, (13, 10)), (10, 3000, (10, 13)), (1, 1, (1, 1))])
def test_of_a_very_long_image_the_middle_is_taken(width, height, expected):
    left, top, w, h, _ = draw_view(width, height, Views(1, 0.9), place=("train", 0, 0)).tolist()
    assert (w, h) == expected
    assert (left, top) == ((width - w) // 2, (height - h) // 2)
