"""Matching labels to a row's choices, including ambiguous labels."""

from __future__ import annotations

import pytest

from pipeline.errors import BadRowError
from pipeline.sources.inputs.choices import read_choice


@pytest.mark.parametrize(
    ("value", "texts", "names", "expected"),
    [
        (0, ["2", "1", "0", "3"], [], 0),
        (3.0, ["2", "1", "0", "3"], [], 3),
        ("1", ["2", "1", "0", "3"], [], 1),  # the text of choice 2, and its number
        ("7", ["5", "7"], [], 1),  # no choice has the number 7
        ("b", ["x", "y"], [], 1),
        ("B", ["A", "B"], [], 1),
        ("0", ["2", "1", "0"], ["0", "1", "2"], 0),  # the data's class names take precedence
        ("-1", ["x", "y"], [], None),
        (None, ["x", "y"], [], None),
    ],
)
def test_numbers_letters_names_and_texts(value, texts, names, expected):
    assert read_choice("answer", value, texts, names) == expected


@pytest.mark.parametrize(
    ("value", "texts", "match"),
    [
        (
            "0",
            ["2", "1", "0", "3"],
            r"'0' is ambiguous: it is the text of choice 3 and the number, from 0, of choice 1; give numbers as",
        ),
        ("A", ["B", "A"], r"'A' is ambiguous: it is the text of choice 2 and the letter of choice 1"),
        ("x", ["x", "x"], "'x' names 2 of the choices"),
    ],
)
def test_a_label_that_may_name_two_choices_is_refused(value, texts, match):
    with pytest.raises(BadRowError, match=match):
        read_choice("answer", value, texts, [])
