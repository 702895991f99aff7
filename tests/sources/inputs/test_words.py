"""Words and their labels, as two lists or as texts with spans."""

from __future__ import annotations

import re
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from pipeline.errors import MisuseError, SourceError
from pipeline.records import NO_LABEL, BadRow, Columns, Example
from pipeline.sources import LabelMap, Source, fingerprints, from_datasets, label_names, read_examples
from pipeline.sources.inputs.words import split_words, tags_of_span

TAGS = ("O", "B-PER", "I-PER", "B-LOC")


def of_words(words: list[Any], labels: list[Any] | None, names: list[str] | None = None) -> Source:
    rows = Dataset.from_dict({"tokens": words, **({} if labels is None else {"tags": labels})})
    if names is not None:
        rows = rows.cast(Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=names))}))
    return from_datasets(rows, Columns(text=None, words="tokens", label="tags"))


def of_spans(texts: list[str], spans: list[Any]) -> Source:
    return from_datasets(Dataset.from_dict({"text": texts, "spans": spans}), Columns(label="spans"))


def span(start: int, end: int, label: str) -> dict[str, Any]:
    return {"start": start, "end": end, "label": label}


def rows_of(source: Source, names: tuple[str, ...] = TAGS) -> list[Example | BadRow]:
    labels = LabelMap.for_names(source, names)
    return list(read_examples(source, "train", 0, len(source.splits["train"]), labels))


def tags_in(row: Example | BadRow, names: tuple[str, ...] = TAGS) -> list[tuple[str, str]]:
    assert isinstance(row, Example)
    assert row.words is not None
    assert row.word_labels is not None
    return [
        (word, "-" if label == NO_LABEL else names[label])
        for word, label in zip(row.words, row.word_labels, strict=True)
    ]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([["B-PER", "O"]], None),  # by name
        ([["b-per", "O "]], None),  # ignoring case and surrounding space
        ([[1, 0]], None),  # by number
        ([[0, 2]], ["B-PER", "I-PER", "O", "B-LOC"]),  # by the names of a ClassLabel in another order
    ],
)
def test_labels_of_words_become_classes(labels, names):
    (row,) = rows_of(of_words([["Ann", "ran"]], labels, names))
    assert tags_in(row) == [("Ann", "B-PER"), ("ran", "O")]


def test_words_and_rows_may_have_no_label():
    source = of_words([["Ann", "ran"], ["So"], ["Bo", "sat"]], [[1, None], None, [NO_LABEL, 0]])
    first, second, third = rows_of(source)
    assert tags_in(first) == [("Ann", "B-PER"), ("ran", "-")]
    assert isinstance(second, Example)
    assert second.word_labels is None
    assert tags_in(third) == [("Bo", "-"), ("sat", "O")]


@pytest.mark.parametrize(
    ("words", "labels", "reason"),
    [
        (["a", "b"], ["O"], "tags: expected 2 labels, one a word, found 1"),
        (["a"], ["O", "O"], "tags: expected 1 labels, one a word, found 2"),
        ([], [], "tokens is empty"),
        (["a", " "], ["O", "O"], "tokens[1]: expected a word, found white space"),
        (["a", ""], ["O", "O"], "tokens[1] is empty"),
        (["a", None], ["O", "O"], "tokens[1] is null"),
        (None, ["O"], "tokens is null"),
    ],
)
def test_rows_that_do_not_fit_are_set_aside(words, labels, reason):
    source = of_words([["x"], words], [["O"], labels])
    first, second = rows_of(source)
    assert isinstance(first, Example)
    assert second == BadRow("train", 1, reason)


def test_a_tag_that_is_no_class_is_an_error():
    with pytest.raises(SourceError, match="split train, row 0: unknown label 'B-ORG'; expected one of O, B-PER"):
        rows_of(of_words([["Acme"]], [["B-ORG"]]))


@pytest.mark.parametrize(
    ("columns", "labels", "message"),
    [
        (
            Columns(text=None, words="tokens", label="tags"),
            ["O"],
            "expected a list of names or class ids, one a word, found text",
        ),
        (
            Columns(text=None, words="tags", label="tokens"),
            ["O"],
            r"\(--words-column\): expected lists of words, found text",
        ),
        (Columns(text="tags", label="tokens"), ["O"], "expected one name or class id a row, found lists of text"),
    ],
)
def test_columns_of_other_types(columns, labels, message):
    rows = Dataset.from_dict({"tokens": [["a"]], "tags": labels})
    with pytest.raises(SourceError, match=message):
        rows_of(from_datasets(rows, columns))


def test_one_kind_of_input():
    rows = Dataset.from_dict({"tokens": [["a"]], "ids": [[1]]})
    with pytest.raises(MisuseError, match="one kind of input at a time: found the columns tokens, ids"):
        from_datasets(rows, Columns(text=None, words="tokens", input_ids="ids"))


def test_names_of_words():
    assert label_names(of_words([["a", "b"], ["c"]], [["O", "B-X"], None])) == ("B-X", "O")
    assert label_names(of_words([["a"]], [[2]])) == ("0", "1", "2")
    assert label_names(of_words([["a"]], [[0]], ["O", "B-X"])) == ("O", "B-X")
    assert label_names(of_spans(["Ann"], [[span(0, 3, "PER")]])) == ("O", "B-PER", "I-PER")
    numbered: dict[str, Any] = {"start": 0, "end": 3, "label": 1}
    assert label_names(of_spans(["Ann"], [[numbered]])) == ("O", "B-0", "I-0", "B-1", "I-1")
    assert label_names(of_words([["a", "b"]], [[NO_LABEL, 1]])) == ("0", "1")


def test_the_names_of_lists_count_in_the_fingerprint():
    one, other = (of_words([["a"]], [[0]], names) for names in (["O", "B-X"], ["B-X", "O"]))
    assert fingerprints(one) != fingerprints(other)


# -------------------------------------------------------------------------------------------- spans


def test_spans_become_tags():
    (row,) = rows_of(of_spans(["Ann Lee's in Rome."], [[span(13, 17, "LOC"), span(0, 7, "PER")]]), TAGS)
    assert tags_in(row) == [
        *[("Ann", "B-PER"), ("Lee", "I-PER"), ("'", "O"), ("s", "O"), ("in", "O"), ("Rome", "B-LOC"), (".", "O")]
    ]


def test_a_span_cuts_a_word():
    (row,) = rows_of(of_spans(["preRome2"], [[span(3, 7, "LOC")]]))
    assert tags_in(row) == [("pre", "O"), ("Rome", "B-LOC"), ("2", "O")]


def test_a_row_without_spans_has_labels_and_one_of_null_has_none():
    labelled, unlabelled, _ = rows_of(of_spans(["so it is", "so", "Ann"], [[], None, [span(0, 3, "PER")]]))
    assert tags_in(labelled) == [("so", "O"), ("it", "O"), ("is", "O")]
    assert isinstance(unlabelled, Example)
    assert (unlabelled.text, unlabelled.words, unlabelled.word_labels) == ("so", None, None)


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ([span(0, 9, "PER")], r"\[0\]: expected characters within 0 to 7, found 0 to 9"),
        ([span(2, 2, "PER")], r"\[0\]: expected characters within 0 to 7, found 2 to 2"),
        ([span(-1, 2, "PER")], "found -1 to 2"),
        ([span(3, 4, "PER")], r"the span of characters 3 to 4 \(PER\) holds no word"),
        ([span(0, 7, "PER"), span(4, 7, "LOC")], r"characters 4 to 7 \(LOC\) overlaps the one before it"),
        ([{"start": 0, "end": 3, "label": None}], r"\[0\]: expected \{start, end, label\}"),
    ],
)
def test_spans_that_do_not_fit_are_set_aside(spans, reason):
    _, row = rows_of(of_spans(["Ann", "Ann Lee"], [[span(0, 3, "PER")], spans]))
    assert isinstance(row, BadRow)
    assert re.search(reason, row.reason)


def test_labels_of_spans_are_found_without_regard_to_case_and_space():
    (row,) = rows_of(of_spans(["Ann Lee"], [[span(0, 7, "per ")]]))
    assert tags_in(row) == [("Ann", "B-PER"), ("Lee", "I-PER")]


def test_a_span_with_an_unknown_label_is_an_error_that_does_not_send_to_the_label_map():
    with pytest.raises(SourceError, match="row 0: unknown label 'ORG' of a span; expected one of O, B-PER") as found:
        rows_of(of_spans(["Acme"], [[span(0, 4, "ORG")]]))
    assert "--label-map" not in str(found.value)


def test_a_label_map_and_spans_exclude_each_other():
    with pytest.raises(
        SourceError, match="--label-map is for labels of rows and words, and column 'spans' holds spans"
    ):
        LabelMap.for_names(of_spans(["Ann"], [[span(0, 3, "person")]]), TAGS, ("person=B-PER",))


@pytest.mark.parametrize(
    ("names", "tags"),
    [
        (("O", "B-X", "I-X"), [["B-X"], ["B-X", "I-X"], ["B-X", "I-X", "I-X"]]),
        (("O", "I-X"), [["I-X"], ["I-X", "I-X"], ["I-X", "I-X", "I-X"]]),
        (("O", "B-X", "I-X", "E-X", "S-X"), [["S-X"], ["B-X", "E-X"], ["B-X", "I-X", "E-X"]]),
        (("O", "B-X", "I-X", "L-X", "U-X"), [["U-X"], ["B-X", "L-X"], ["B-X", "I-X", "L-X"]]),
        (("O", "X"), [["X"], ["X", "X"], ["X", "X", "X"]]),
    ],
)
def test_the_scheme_of_the_tags_is_the_models(names, tags):
    assert [tags_of_span("X", count, names) for count in (1, 2, 3)] == tags


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop - e.g. at 3.5%", ["Don", "'", "t", "stop", "-", "e", ".", "g", ".", "at", "3", ".", "5", "%"]),
        ("東京はカナ x", ["東", "京", "は", "カ", "ナ", "x"]),
        ("naïve Übung\u00a0हिन्दी", ["naïve", "Übung", "हिन्दी"]),
        (" \n\t", []),
    ],
)
def test_texts_as_words(text, words):
    assert [text[start:end] for start, end in split_words(text)] == words


def test_unlabelled_rows_are_read_without_a_label_column():
    (row,) = rows_of(of_words([["a", "b"]], None))
    assert isinstance(row, Example)
    assert row.word_labels is None
