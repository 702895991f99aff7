"""Values and comments in the generated YAML file."""

from __future__ import annotations

import pytest
import yaml

from pipeline.starter.page import comment, scalar
from pipeline.starter.times import duration

VALUES = [
    "text",
    "Ticket Body",
    "a\nb",
    "yes",
    "12",
    "#x",
    "a: b",
    "größe",
    "- a",
    "~/x",
    "'",
    '"',
    "{a}",
    " x ",
    "",
    3,
    ["a", "b\nc"],
]


@pytest.mark.parametrize("value", VALUES)
def test_a_value_is_one_line_that_means_itself(value):
    text = scalar(value)
    assert "\n" not in text
    assert yaml.safe_load(f"key: {text}  # remark") == {"key": value}


def test_a_comment_is_lines_of_comment():
    lines = comment("one\ntwo: three # four " + "word " * 60, 2)
    assert len(lines) > 3
    assert all(line.startswith("  # ") and len(line) <= 100 for line in lines)
    assert yaml.safe_load("\n".join(lines)) is None
    assert comment("") == []


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(3, "a few seconds"), (34, "30 s"), (200, "3 min"), (5400, "1.5 h"), (36_000, "10 h"), (1e6, "12 days")],
)
def test_a_time_in_words(seconds, said):
    assert duration(seconds) == said
