"""A row shown as tokens, with predicted tokens in brackets."""

from __future__ import annotations

import numpy as np

from pipeline.cache.views.tokens import marked_tokens


class Letters:
    def convert_ids_to_tokens(self, ids):
        return ["\x1b[2J" if i == 99 else chr(97 + i % 26) for i in ids]


def test_a_supervised_position_marks_the_token_after_it():
    assert marked_tokens(Letters(), [0, 1, 2, 3], np.array([False, True, True, False])) == "a b [c] [d]"


def test_a_classifiers_row_has_no_marks():
    assert marked_tokens(Letters(), [0, 1, 2], None) == "a b c"


def test_of_a_long_row_the_part_around_the_first_prediction_is_shown():
    supervised = np.zeros(500, dtype=bool)
    supervised[300:] = True
    shown = marked_tokens(Letters(), list(range(98)) * 5 + list(range(10)), supervised)
    assert shown.startswith("... 281 tokens ... ")
    assert shown.endswith(" ... 139 tokens ...")
    assert shown.count("[") == 60


def test_control_characters_do_not_reach_the_terminal():
    assert marked_tokens(Letters(), [99, 0], None) == r"'\x1b[2J' a"
