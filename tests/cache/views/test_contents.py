"""Report lines on rows that were cut, duplicated, empty or unlabelled."""

from __future__ import annotations

from pipeline.cache.views.contents import contents_lines
from pipeline.records import SourceContents, SplitContents


def test_nothing_is_said_of_rows_as_they_are_meant():
    assert (
        contents_lines(SourceContents({"train": SplitContents(5, 0, 0), "test": SplitContents(3, None, 0)}, {})) == []
    )


def test_each_kind_is_one_line_with_counts():
    splits = {"train": SplitContents(2000, 1500, 1), "test": SplitContents(300, 0, 2)}
    lines = contents_lines(SourceContents(splits, {"train, test": 12}, cut_rows=7, cut_tokens=1234))
    assert lines == [
        "7 of 2,300 rows were cut at the maximum length and lost 1,234 tokens (--max-length)",
        "equal contents in both splits train and test: 12; a score on either is too high",
        "3 of 2,300 rows have a text of white space only",
        "rows without a label: 1,500 of 2,000 in train",
    ]
