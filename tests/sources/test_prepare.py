import datetime
from typing import Any

import datasets
import pytest

from pipeline.config import DataConfig
from pipeline.errors import MisuseError, SourceError
from pipeline.records import Columns
from pipeline.sources import from_datasets, load_source


def data(**columns: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


TEXT = data(text=["a", "b"], label=["x", None], id=[1, 2])
CHAT = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}]]


def test_a_bare_data_set_is_train() -> None:
    source = from_datasets(TEXT, Columns())
    assert (source.name, source.config, source.revision, source.holdout) == ("in-memory", None, None, 0.0)
    assert list(source.splits) == ["train"]
    assert source.columns == Columns()


def test_a_label_column_that_is_nowhere_is_none() -> None:
    assert from_datasets(data(text=["a"]), Columns()).columns.label is None
    some = {"train": TEXT, "test": data(text=["a"])}
    assert from_datasets(some, Columns()).columns.label == "label"


def test_text_gives_way_to_another_input() -> None:
    columns = from_datasets(data(chat=CHAT), Columns(messages="chat", keep=())).columns
    assert (columns.text, columns.messages) == (None, "chat")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(prompt="p"), "--prompt-column and --completion-column go together"),
        (Columns(labels="l"), "--labels-column goes with --input-ids-column"),
        (Columns(messages="m", input_ids="i"), "one kind of input at a time: found the columns m, i"),
        (Columns(messages="m", text_pair="t"), "--text-pair-column goes with --text-column"),
        (Columns(text=None), "no input: name a column with --text-column"),
    ],
)
def test_columns_that_contradict_each_other(columns: Columns, message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        from_datasets(TEXT, columns)


@pytest.mark.parametrize(
    ("dataset", "columns", "message"),
    [
        (TEXT, Columns(text="body"), "split train: no column 'body'; found text, label, id; .*--text-column"),
        (TEXT, Columns(text_pair="other"), "no column 'other'; .*--text-pair-column"),
        (TEXT, Columns(prompt="p", completion="text"), "no column 'p'; .*--prompt-column"),
        (
            TEXT,
            Columns(input_ids="text", labels="l"),
            "'text' .--input-ids-column.: expected lists of integers, found text",
        ),
        (TEXT, Columns(keep=("id", "lang")), "no column 'lang'; .*--keep-column"),
        (TEXT, Columns(text="id"), "'id' .--text-column.: expected text, found integers; convert it to text"),
        (data(text=[None, None]), Columns(), "expected text, found nulls; every row is empty"),
        (data(text=[["a"], ["b"]]), Columns(), "expected text, found lists of text"),
        (data(text=[datetime.datetime(2026, 1, 2)]), Columns(), "found timestamp.* JSON text that looks like a date"),
        (
            TEXT,
            Columns(messages="text"),
            r"'text' .--messages-column.: expected lists of \{role, content\}, found text",
        ),
        (
            data(chat=[[{"from": "human", "text": "hi"}]]),
            Columns(messages="chat"),
            "found lists of structs of from, text; name another column",
        ),
        (data(chat=[["a"]]), Columns(messages="chat"), "found lists of text; name another column"),
        (
            data(p=[["a"]], c=[["a"]]),
            Columns(prompt="p", completion="c"),
            "'p' .--prompt-column.: expected text, found lists of text",
        ),
        (data(ids=[[0.5]]), Columns(input_ids="ids"), "expected lists of integers, found lists of floats"),
        (
            data(text=["a"], tags=[["x"]]),
            Columns(keep=("tags",)),
            "'tags' .--keep-column.: expected text, numbers or booleans, found lists of text",
        ),
        (data(text=["a"], when=[{"y": 1}]), Columns(keep=("when",)), "found structs of y"),
        ({"train": TEXT, "test": TEXT.select([])}, Columns(), "split test: no rows; expected at least one"),
        ({}, Columns(), "no split; expected at least one data set"),
        ({"a/b": TEXT}, Columns(), "'a/b' cannot be a split"),
        (
            {"train": TEXT.to_iterable_dataset()},
            Columns(),
            "found IterableDataset; expected Parquet files as they are, .*: load it without streaming",
        ),
        (
            datasets.Dataset.from_dict(
                {"text": ["a"], "j": [{"x": 1}]},
                features=datasets.Features(text=datasets.Value("string"), j=datasets.Json()),
            ),
            Columns(text="j"),
            "expected text, found values of mixed types",
        ),
    ],
)
def test_columns_that_the_data_does_not_have(dataset: Any, columns: Columns, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        from_datasets(dataset, columns)
    assert str(caught.value).startswith("in-memory")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("item", [datasets.List, datasets.LargeList])
def test_lists_of_either_width(item: Any) -> None:
    turn = {"role": datasets.Value("string"), "content": datasets.Value("large_string")}
    features = datasets.Features(chat=item(turn), ids=item(datasets.Value("uint16")))
    dataset = datasets.Dataset.from_dict({"chat": CHAT, "ids": [[1], [2]]}, features=features)
    from_datasets(dataset, Columns(messages="chat"))
    from_datasets(dataset, Columns(input_ids="ids"))


def test_splits_are_restricted_in_their_own_order() -> None:
    three = {"train": TEXT, "validation": TEXT, "test": TEXT}
    assert list(from_datasets(three, Columns(), splits=("test", "train")).splits) == ["train", "test"]
    with pytest.raises(SourceError, match="no split 'dev'; found train, validation, test; set --split"):
        from_datasets(three, Columns(), splits=("dev",))


def test_a_split_that_is_not_asked_for_is_not_checked() -> None:
    assert list(from_datasets({"train": TEXT, "test": data(x=[1])}, Columns(), splits=("train",)).splits) == ["train"]


def test_a_required_label(tmp_path: Any) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a", "topic": "x", "tags": [1]}\n')
    with pytest.raises(
        SourceError, match=r"d.jsonl: no label column 'label'; found text, topic, tags; .*--label-column"
    ):
        load_source(DataConfig(dataset=str(path)), label_required=True)
    with pytest.raises(SourceError, match=r"'tags' .--label-column.: expected one name or class id a row"):
        load_source(DataConfig(dataset=str(path), label_column="tags"), label_required=True)
    assert (
        load_source(DataConfig(dataset=str(path), label_column="topic"), label_required=True).columns.label == "topic"
    )


def test_holdout_makes_a_test_split_where_there_is_none() -> None:
    many = data(text=[f"text {i}" for i in range(400)], label=[i % 2 for i in range(400)])
    source = from_datasets({"train": many, "validation": many}, Columns(), holdout=0.25)
    assert (source.holdout, list(source.splits)) == (0.25, ["train", "validation", "test"])
    sizes = {split: len(part) for split, part in source.splits.items()}
    assert sizes["train"] + sizes["test"] == 400
    assert 70 <= sizes["test"] <= 130
    assert list(from_datasets(many, Columns(), holdout=0.25, splits=("test",)).splits) == ["test"]


def test_holdout_leaves_a_test_split_alone() -> None:
    both = {"train": TEXT, "test": TEXT}
    source = from_datasets(both, Columns(), holdout=0.5, splits=("train",))
    assert (source.holdout, len(source.splits["train"])) == (0.0, 2)


def test_holdout_that_cannot_be() -> None:
    with pytest.raises(MisuseError, match=r"expected a share in \[0, 1\), found 1"):
        from_datasets(TEXT, Columns(), holdout=1)
    with pytest.raises(SourceError, match="takes rows from the split train; found validation; drop --holdout"):
        from_datasets({"validation": TEXT}, Columns(), holdout=0.5)
    with pytest.raises(SourceError, match="puts 0 of 2 rows of train into test, expected some in each"):
        from_datasets(TEXT, Columns(), holdout=1e-9)
    with pytest.raises(SourceError, match="no column 'body'"):
        from_datasets(TEXT, Columns(text="body"), holdout=0.5)


@pytest.mark.parametrize(
    ("dataset", "found", "instead"),
    [
        ([{"text": "a"}], "list", r"Dataset\.from_list\(rows\)"),
        (({"text": "a"},), "tuple", r"Dataset\.from_list\(rows\)"),
        ({"train": [{"text": "a"}]}, "list", r"Dataset\.from_list\(rows\)"),
        ({"text": ["a"], "label": [0]}, "list", r"Dataset\.from_dict\(columns\)"),
        ({"train": {"text": ["a"]}}, "dict", r"Dataset\.from_dict\(columns\)"),
        (({"text": text} for text in "ab"), "generator", r"Dataset\.from_generator"),
        (TEXT.to_iterable_dataset(), "IterableDataset", r"without streaming=True, .*Dataset\.from_generator"),
        (TEXT.to_pandas(), "DataFrame", r"Dataset\.from_pandas\(frame\)"),
        (3, "int", "DatasetDict"),
    ],
)
def test_what_to_pass_instead(dataset: Any, found: str, instead: str) -> None:
    with pytest.raises(SourceError, match=rf"expected a datasets\.Dataset, found {found}; .*{instead}"):
        from_datasets(dataset, Columns())


def test_a_transform_that_would_not_be_applied() -> None:
    changed = TEXT.with_transform(lambda rows: {"text": [text.upper() for text in rows["text"]]})
    for dataset in (changed, {"train": TEXT, "test": changed}):
        with pytest.raises(SourceError, match=r"split t\w+: has a transform .*map\(\)"):
            from_datasets(dataset, Columns())
    with pytest.raises(SourceError, match="split train: has a transform"):
        from_datasets(changed, Columns(), holdout=0.5)


def test_another_format_is_fine() -> None:
    assert list(from_datasets(TEXT.with_format("numpy"), Columns()).splits) == ["train"]
