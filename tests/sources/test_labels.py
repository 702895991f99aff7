from typing import Any

import datasets
import pytest

from pipeline.errors import SourceError
from pipeline.records import Columns, Example
from pipeline.sources import LabelMap, Source, from_datasets, label_names, read_examples


def source(*labels: Any, names: list[str] | None = None, **more: list[Any]) -> Source:
    """One text for each label; `names` makes them a `ClassLabel`; `more` are other splits."""

    def split(values: Any) -> datasets.Dataset:
        dataset = datasets.Dataset.from_dict({"text": ["t"] * len(values), "label": list(values)})
        return dataset if names is None else dataset.cast_column("label", datasets.ClassLabel(names=names))

    return from_datasets({"train": split(labels), **{name: split(values) for name, values in more.items()}}, Columns())


def mapped(data: Source, *names: str) -> list[int | None]:
    rows = read_examples(data, "train", 0, len(data.splits["train"]), LabelMap.for_names(data, names))
    return [row.label for row in rows if isinstance(row, Example)]


def test_names_of_a_class_label() -> None:
    assert label_names(source(1, 0, -1, names=["neg", "pos"])) == ("neg", "pos")


def test_texts_of_all_splits_sorted() -> None:
    assert label_names(source("b", None, "a", test=["c", "a"])) == ("a", "b", "c")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ((0, 3, None), ("0", "1", "2", "3")),
        ((1.0, float("nan"), 0.0), ("0", "1")),
        ((False, True), ("0", "1")),
        ((-1, 1), ("0", "1")),
    ],
)
def test_numbers_from_0_to_the_largest(labels: Any, names: tuple[str, ...]) -> None:
    assert label_names(source(*labels)) == names


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            from_datasets(datasets.Dataset.from_dict({"text": ["a"]}), Columns()),
            "no label column; name it with --label-column",
        ),
        (source(None, None), "no labelled row in column 'label'; label some rows"),
        (source(-1, -1), "no labelled row"),
        (source(0.5), "split train, row 0: label 0.5 is no class; expected a name or a whole number"),
        (source(0, -7), "split train, row 1: label -7 is no class; expected 0 to 99999"),
        (source(0, 10**9), "label 1000000000 is no class"),
        (source([1], [0]), "expected one name or class id a row, found lists of integers"),
    ],
)
def test_labels_that_are_no_classes(data: Source, message: str) -> None:
    with pytest.raises(SourceError, match=f"^in-memory.*{message}"):
        label_names(data)


def test_names_and_numbers_in_one_data_set() -> None:
    numbers = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    names = datasets.Dataset.from_dict({"text": ["a"], "label": ["x"]})
    with pytest.raises(
        SourceError,
        match=r"split test, row 0: found both names and numbers .*a number at in-memory: split train, row 0",
    ):
        label_names(from_datasets({"train": numbers, "test": names}, Columns()))


def test_texts_are_looked_up() -> None:
    assert mapped(source("pos", "neg", None), "neg", "pos") == [1, 0, None]


def test_a_class_label_is_looked_up_by_its_names() -> None:
    data = source(0, 1, -1, names=["neg", "pos"])
    assert mapped(data, "pos", "other", "neg") == [2, 0, None]


def test_a_class_label_with_other_names_is_the_number() -> None:
    data = source(0, 1, None, names=["neg", "pos"])
    assert mapped(data, "LABEL_0", "LABEL_1") == [0, 1, None]
    assert mapped(data, "neg", "positive") == [0, 1, None]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ((2, 0, -1, None), [2, 0, None, None]),
        ((1.0, float("nan"), None), [1, None, None]),
        ((True, False, None), [1, 0, None]),
    ],
)
def test_numbers_are_the_class(labels: Any, expected: list[int | None]) -> None:
    assert mapped(source(*labels), "a", "b", "c") == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (source("a", "z"), "row 1: unknown label 'z'; expected one of a, b; mend the row, or name another column"),
        (source(0, 2), r"row 1: label 2 out of range; expected 0 to 1 \(a, b\); mend the row"),
        (source(0, -2), "row 1: label -2 out of range"),
        (source(0.0, 0.5), "row 1: label 0.5 is no class; expected a name or a whole number"),
    ],
)
def test_labels_that_the_model_does_not_have(data: Source, message: str) -> None:
    with pytest.raises(SourceError, match=f"^in-memory: split train, {message}"):
        mapped(data, "a", "b")


def test_many_names_are_cut_short() -> None:
    with pytest.raises(SourceError, match=r"19, \.\.\. \(50 in all\); mend"):
        mapped(source("z"), *(f"name{i}" for i in range(50)))


def test_a_split_without_labels_and_a_column_of_lists() -> None:
    data = from_datasets(
        {
            "train": datasets.Dataset.from_dict({"text": ["a"], "label": ["x"]}),
            "test": datasets.Dataset.from_dict({"text": ["a"]}),
        },
        Columns(),
    )
    labels = LabelMap.for_names(data, ("x",))
    assert list(read_examples(data, "test", 0, 1, labels)) == [Example(0, text="a")]
    with pytest.raises(SourceError, match="expected one name or class id a row"):
        LabelMap.for_names(source([1], [0]), ("x",))
