from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import SourceError
from pipeline.records import Columns, Example
from pipeline.sources import LabelMap, Source, from_datasets, label_names, read_examples


def source(*labels: Any, names: list[str] | None = None, **more: list[Any]) -> Source:
    """Return a source with one text per label.

    Args:
        names: makes the labels a `ClassLabel`.
        more: other splits.
    """

    def split(values: Any) -> datasets.Dataset:
        dataset = datasets.Dataset.from_dict({"text": ["t"] * len(values), "label": list(values)})
        return dataset if names is None else dataset.cast_column("label", datasets.ClassLabel(names=names))

    return from_datasets({"train": split(labels), **{name: split(values) for name, values in more.items()}}, Columns())


def mapped(data: Source, *names: str, label_map: tuple[str, ...] = ()) -> list[int | None]:
    rows = read_examples(data, "train", 0, len(data.splits["train"]), LabelMap.for_names(data, names, label_map))
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


def test_names_that_are_numbers_are_sorted_as_numbers() -> None:
    assert label_names(source("10", "2", "1", "x")) == ("1", "2", "10", "x")


@pytest.mark.parametrize("names", [None, ["positive", "negative", "Positive "]])
def test_labels_that_differ_in_case_or_space_alone(names: list[str] | None, caplog: Any) -> None:
    data = source(*(["positive", "negative", "Positive "] if names is None else [0, 1, 2]), names=names)
    assert set(label_names(data)) == {"negative", "positive", "Positive "}
    assert "which become two classes" in caplog.text
    caplog.clear()
    mended = label_names(data, ["Positive =positive"])
    assert set(mended) == {"negative", "positive"}
    assert not caplog.text
    labels = LabelMap.for_names(data, mended, ["Positive =positive"])
    found = [row.label for row in read_examples(data, "train", 0, 3, labels) if isinstance(row, Example)]
    assert found[0] == found[2] != found[1]


def test_a_label_map_names_the_classes_of_a_new_teacher() -> None:
    assert label_names(source(0, 1, 2), ["0=World", "1=Sports"]) == ("World", "Sports", "2")
    assert label_names(source(-1, 1), ["-1=bad", "1=good", "0=neutral"]) == ("bad", "neutral", "good")
    assert label_names(source(0, 1, names=["n", "p"]), ["p=positive", "0=negative"]) == ("negative", "positive")


def test_a_label_map_of_a_new_teacher_names_labels_that_there_are() -> None:
    """The label map defines the classes, so the error names the missing label, not a class."""
    data = source("cats", " dogs ")
    assert label_names(data, ("Cats=animals",)) == (" dogs ", "animals")  # compared case-insensitively
    with pytest.raises(SourceError, match=r"no row has the label 'x'; expected .* one of ' dogs ', cats$"):
        label_names(data, ("cats=animals", "x=animals"))
    with pytest.raises(SourceError, match=r"no row has the label '7'; expected .* one of 0, 1$"):
        label_names(source(0, 1), ("7=seven",))


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
        (source("a", "z"), "row 1: unknown label 'z'; expected one of a, b; correct the row, or name another column"),
        (source(0, 2), r"row 1: label 2 out of range; expected 0 to 1 \(a, b\); correct the row"),
        (source(0, -2), "row 1: label -2 out of range"),
        (source(0.0, 0.5), "row 1: label 0.5 is no class; expected a name or a whole number"),
    ],
)
def test_labels_that_the_model_does_not_have(data: Source, message: str) -> None:
    with pytest.raises(SourceError, match=f"^in-memory: split train, {message}"):
        mapped(data, "a", "b")


def test_many_names_are_cut_short() -> None:
    with pytest.raises(SourceError, match=r"19, \.\.\. \(50 in all\); correct"):
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


def test_numbers_are_looked_up_where_the_names_are_numbers() -> None:
    assert mapped(source(1, 5, None, -1), "1", "2", "3", "4", "5") == [0, 4, None, None]
    assert mapped(source(0, 1), "1", "0") == [1, 0]
    assert mapped(source(2.0, 10.0), "10", "2") == [1, 0]
    assert mapped(source(-1, 0, 1), "-1", "0", "1") == [0, 1, 2]
    assert mapped(source("1", " 5"), "1", "2", "3", "4", "5") == [0, 4]
    with pytest.raises(SourceError, match="row 0: label 0 out of range; expected one of the classes named 1, 2, 3; "):
        mapped(source(0, 1), "1", "2", "3")


def test_a_number_at_the_position_of_a_class_that_is_another_number() -> None:
    assert mapped(source(0, 5), "other", "0", "5") == [1, 2]
    with pytest.raises(
        SourceError,
        match="label 1 is ambiguous: it is the name of no class, and the class at position 1 is named by another",
    ):
        mapped(source(1), "other", "0", "5")
    assert mapped(source(0, 1), "other", "0", "5", label_map=("0=0", "1=other")) == [1, 0]
    assert mapped(source(0, 2), "0", "x", "y") == [0, 2]


def test_labels_that_are_merged_keep_their_names() -> None:
    data, label_map = source(0, 1, 2, 3), ("0=World", "1=World")
    assert label_names(data, label_map) == ("World", "2", "3")
    assert mapped(data, "World", "2", "3", label_map=label_map) == [0, 0, 1, 2]


def test_booleans_are_looked_up_where_the_names_are_true_and_false() -> None:
    assert mapped(source(True, False), "True", "false") == [0, 1]


def test_names_match_without_regard_to_case_and_space() -> None:
    assert mapped(source("Positive ", "NEGATIVE"), "negative", "positive") == [1, 0]
    assert mapped(source("pos", "Pos"), "Pos", "pos") == [1, 0]  # exact names match first
    with pytest.raises(SourceError, match="row 0: label 'POS' may be 'Pos' or 'pos', which differ in case or space"):
        mapped(source("POS"), "Pos", "pos")


def test_a_class_label_is_looked_up_without_regard_to_case(caplog: Any) -> None:
    data = source(0, 1, 2, -1, names=["entailment", "neutral", "contradiction"])
    assert mapped(data, "CONTRADICTION", "NEUTRAL", "ENTAILMENT") == [2, 1, 0, None]
    assert not caplog.text
    with pytest.raises(
        SourceError, match="label 0 is 'entailment', which is the model's class 2, and 'contradiction' is"
    ):
        mapped(data, "against", "neutral", "entailment")
    assert mapped(data, "against", "neutral", "entailment", label_map=("contradiction=against",)) == [2, 1, 0, None]


@pytest.mark.parametrize(
    ("labels", "label_map", "expected"),
    [
        ((0, 1, 2), ("0=c", "2=a"), [2, 1, 0]),
        ((0, 1, 2), ("0=LABEL_2", "1=0", "2=1"), [2, 0, 1]),
        ((3, 1, None), ("3=a",), [0, 1, None]),
        ((-1, 1), ("-1=a",), [0, 1]),
        ((1.0, 0.0), ("1=c",), [2, 0]),
        (("x", "B ", "X"), ("x=a",), [0, 1, 0]),
        (("x=y", "b"), ("x=y=c",), [2, 1]),
        ((True, False), ("true=c", "false=a"), [2, 0]),
        ((True, False), ("1=c",), [2, 0]),
    ],
)
def test_a_label_map_comes_first(labels: Any, label_map: tuple[str, ...], expected: list[int | None]) -> None:
    assert mapped(source(*labels), "a", "b", "c", label_map=label_map) == expected


def test_a_label_map_of_a_class_label_takes_names_and_numbers() -> None:
    data = source(0, 1, -1, names=["n", "p"])
    assert mapped(data, "pos", "other", "neg", label_map=("n=neg", "1=pos")) == [2, 0, None]
    assert mapped(data, "pos", "neg", label_map=("n=neg", "p=pos")) == [1, 0, None]
    labels = LabelMap.for_names(data, ("LABEL_0", "LABEL_1"), ("p=1", "0=LABEL_0"))
    assert labels.contract_form == ("0=LABEL_0", "p=LABEL_1")


@pytest.mark.parametrize(
    ("data", "label_map", "message"),
    [
        (source(0, 1), ("0=z",), "^--label-map 0=z: unknown class 'z'; expected one of a, b, c$"),
        (source(0, 1), ("0=3",), "unknown class '3'"),
        (source(0, 1), ("0=LABEL_3",), "unknown class 'LABEL_3'"),
        (source(0, 1), ("7=a",), "--label-map: no row has the label '7'; expected DATA=MODEL with DATA one of 0, 1$"),
        (source("x", "y"), ("z=a",), "no row has the label 'z'; expected DATA=MODEL with DATA one of x, y$"),
        (source(0, 1), ("0=a", "0=b"), "label '0' is given two classes"),
        (source(0, names=["n", "p"]), ("q=a", "n=a", "p=b"), "no row has the label 'q'; .* one of n, p$"),
        (source(0, names=["n", "p", "q"]), ("n=a", "p=b"), "unknown label 'q'; .*; give --label-map q=MODEL too"),
        (
            from_datasets(datasets.Dataset.from_dict({"text": ["a"], "topic": ["x"]}), Columns()),
            ("x=a",),
            "--label-map: no label column; found text, topic; name it with --label-column",
        ),
    ],
)
def test_a_side_of_the_label_map_that_is_not_known(data: Source, label_map: tuple[str, ...], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        LabelMap.for_names(data, ("a", "b", "c"), label_map)


#: Words, digits out of numeric order, and the generic names of transformers.
NAMES = st.one_of(
    st.lists(st.sampled_from(["sport", "Film", "New York", "é", "2", "10", "1"]), min_size=2, max_size=7, unique=True),
    st.integers(2, 7).map(lambda n: [f"LABEL_{i}" for i in range(n)]),
)


@settings(deadline=None, max_examples=40)
@given(NAMES, st.data())
def test_a_class_is_found_by_its_name_however_the_data_writes_it(names: list[str], data: st.DataObject) -> None:
    """Labels are text in any case, with space, a reordered `ClassLabel`, or digits."""
    classes = data.draw(st.lists(st.integers(0, len(names) - 1), min_size=1, max_size=8))
    forms = st.sampled_from([str, str.upper, str.lower, lambda name: f"  {name}\n"])
    assert mapped(source(*(data.draw(forms)(names[c]) for c in classes)), *names) == classes
    order = data.draw(st.permutations(names))
    assert mapped(source(*(order.index(names[c]) for c in classes), names=order), *names) == classes
    digits = [c for c in classes if names[c].isdigit()]
    if digits:
        assert mapped(source(*(int(names[c]) for c in digits)), *names) == digits
    if names[0] == "LABEL_0":
        assert mapped(source(*classes), *names) == classes
    given_map = tuple(f"x{c}={names[c]}" for c in set(classes))
    assert mapped(source(*(f"x{c}" for c in classes)), *names, label_map=given_map) == classes
