from __future__ import annotations

import math

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from pipeline.errors import BadRowError, SourceError
from pipeline.records import BadRow, Columns, Example
from pipeline.sources import from_datasets, head_names, label_reader, list_starts, read_examples
from pipeline.sources.scores import ScoreColumn

COLUMNS = Columns(text="text", label="score")


def source_of(scores: list, columns: Columns = COLUMNS, **more):
    rows = {"text": [f"text {i}" for i in range(len(scores))], "score": scores, **more}
    return from_datasets(DatasetDict({"train": Dataset.from_dict(rows)}), columns)


def read(source, outputs: int) -> list[Example | BadRow]:
    reader = label_reader(source, [str(i) for i in range(outputs)], holds="scores")
    return list(read_examples(source, "train", 0, len(source.splits["train"]), reader))


@pytest.mark.parametrize(
    ("scores", "names", "expected"),
    [
        ([1, 2, None], ("score",), [(1.0,), (2.0,), (math.nan,)]),
        ([1.5, -2e6], ("score",), [(1.5,), (-2e6,)]),
        ([True, False], ("score",), [(1.0,), (0.0,)]),
        ([[1.5], [2.0], None], ("score_0",), [(1.5,), (2.0,), (math.nan,)]),
        ([[1.5, None], [2.0, 3.0]], ("score_0", "score_1"), [(1.5, math.nan), (2.0, 3.0)]),
    ],
)
def test_scores_are_read_as_numbers(scores, names, expected):
    source = source_of(scores)
    assert head_names(source, holds="scores") == names
    found = [item.scores for item in read(source, len(names)) if isinstance(item, Example)]
    assert str(found) == str(expected)


def test_a_source_without_the_column_has_unknown_scores():
    source = source_of([0.0], Columns(text="text", label="grade"))
    (row,) = read(source, 2)
    assert isinstance(row, Example)
    assert row.scores is not None
    assert all(map(math.isnan, row.scores))


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([[1.0, 2.0, 3.0]], "score: expected 2 scores, as many as the model has outputs, found 3"),
        ([3.0], "score: expected 2 scores, as many as the model has outputs, found 1"),
        ([[1.0, math.inf]], "score: expected finite scores, found inf"),
        ([[1.0, 1e39]], "score: expected finite scores, found 1e+39"),
    ],
)
def test_rows_that_are_no_scores_are_set_aside(scores, reason):
    (row,) = read(source_of(scores), 2)
    assert isinstance(row, BadRow)
    assert row.reason == reason


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (["high", "low"], r"column 'score' \(--label-column\): expected a number a row, or a list of as many as the model has outputs, found text"),
        ([None, None], r"no row with a score in column 'score'"),
        ([[1.0], [1.0, 2.0]], r"column 'score': expected lists of one number for each output, found lists of 1 and of 2"),
    ],
)  # fmt: skip
def test_columns_that_are_no_scores_are_refused(scores, message):
    with pytest.raises(SourceError, match=message):
        head_names(source_of(scores), holds="scores")


def test_names_of_classes_are_no_scores():
    features = Features({"text": Value("string"), "score": ClassLabel(names=["bad", "good"])})
    rows = Dataset.from_dict({"text": ["a"], "score": [1]}, features=features)
    with pytest.raises(SourceError, match="found class labels"):
        ScoreColumn.of(from_datasets(rows, COLUMNS), 1)
    with pytest.raises(SourceError, match="--label-map is for class labels, and here they are scores"):
        ScoreColumn.of(source_of([1.0]), 1, ("1=good",))


RANKED = Columns(text="text", label="score", group="query")


def test_lists_begin_where_their_value_changes():
    source = source_of([0.0] * 5, RANKED, query=["a", "a", "b", "b", "b"])
    assert list_starts(source) == {"train": [0, 2]}
    assert list_starts(source_of([0.0])) == {}
    found = [item.group for item in read(source, 1) if isinstance(item, Example)]
    assert found[0] == found[1] != found[2] == found[3] == found[4]
    assert all(number is not None and 0 <= number < 2**63 for number in found)


def test_a_list_of_one_row_and_a_row_of_no_list_are_set_aside():
    rows = read(source_of([0.0] * 5, RANKED, query=["a", "a", "b", None, None]), 1)
    reasons = [row.reason for row in rows if isinstance(row, BadRow)]
    assert reasons == [
        "query: 'b' is a list of one row, which has nothing to be ranked against",
        *["query: expected a name or a number, found null"] * 2,
    ]


def test_lists_whose_rows_stand_apart_are_refused():
    with pytest.raises(
        SourceError,
        match=r"column 'query' \(--group-column\): the rows of 'a' are not consecutive: row 4 is separate; sort the rows by the column",
    ):
        read(source_of([0.0] * 6, RANKED, query=["a", "a", "b", "b", "a", "a"]), 1)


@pytest.mark.parametrize(
    ("column", "message"),
    [([1.5, 2.5], "expected text or whole numbers, found floats"), ([["a"], ["b"]], "found lists of text")],
)
def test_columns_that_name_no_lists_are_refused(column, message):
    with pytest.raises(SourceError, match=message):
        source_of([0.0, 0.0], RANKED, query=column)
    with pytest.raises(SourceError, match=r"no column 'query'; .* name the right one with --group-column"):
        source_of([0.0, 0.0], RANKED)


def test_a_held_out_part_has_whole_lists():
    names = [f"q{i // 4}" for i in range(400)]
    rows = Dataset.from_dict({"text": [f"text {i}" for i in range(400)], "score": [0.0] * 400, "query": names})
    source = from_datasets(rows, RANKED, holdout=0.2)
    parts = [set(source.splits[split]["query"]) for split in ("train", "test")]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 100


def test_a_reader_of_another_number_of_outputs_says_so():
    with pytest.raises(BadRowError, match="expected 1 scores"):
        ScoreColumn(1).read([1.0, 2.0])
