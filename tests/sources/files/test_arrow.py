import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import DataConfig
from pipeline.errors import MisuseError, SourceError
from pipeline.records import Example
from pipeline.sources import LabelMap, Source, fingerprints, label_names, load_source, read_examples
from pipeline.sources.files.layout import find_files, looks_like_path

ROWS = [{"text": "one", "label": "a"}, {"text": "two, or 2", "label": None}, {"text": "dreißig", "label": "b"}]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(source: Source, split: str = "train") -> list[str | None]:
    examples = read_examples(source, split, 0, len(source.splits[split]), None)
    return [example.text for example in examples if isinstance(example, Example)]


def write(path: Path) -> Path:
    """Write ROWS in the format of the suffix."""
    if path.suffix.lower() == ".jsonl":
        return jsonl(path, ROWS)
    if path.suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.suffix == ".csv":
        path.write_text('text,label\none,a\n"two, or 2",\ndreißig,b\n', encoding="utf-8")
    elif path.suffix == ".gz":
        inner = write(path.with_suffix(""))
        path.write_bytes(gzip.compress(inner.read_bytes()))
        inner.unlink()
    else:
        path.write_text("one\ntwo, or 2\ndreißig\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name", ["d.jsonl", "d.json", "d.csv", "d.parquet", "d.txt", "d.jsonl.gz", "d.csv.gz", "d.txt.gz", "D.JSONL"]
)
def test_each_format_is_the_split_train(tmp_path: Path, name: str) -> None:
    source = load_source(DataConfig(dataset=str(write(tmp_path / name))))
    assert (source.name, source.config, source.revision, list(source.splits)) == (name, None, None, ["train"])
    assert texts(source) == ["one", "two, or 2", "dreißig"]


def test_formats_with_equal_rows_have_equal_fingerprints(tmp_path: Path) -> None:
    names = ["d.jsonl", "d.json", "d.csv", "d.parquet", "d.jsonl.gz"]
    sources = [load_source(DataConfig(dataset=str(write(tmp_path / name)))) for name in names]
    found = {fingerprints(source, by_contents=True)["train"] for source in sources}
    assert len(found) == 1


def test_csv_words_for_missing_are_words(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text,label\nNA,None\nnull,1\n", encoding="utf-8")
    assert texts(load_source(DataConfig(dataset=str(tmp_path / "d.csv")))) == ["NA", "null"]


def test_directory_has_one_file_per_split(tmp_path: Path) -> None:
    jsonl(tmp_path / "extra.jsonl", ROWS)
    jsonl(tmp_path / "test.jsonl", ROWS[:1])
    write(tmp_path / "validation.csv")
    jsonl(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "README.md").write_text("# read me")
    (tmp_path / "prepare.py").write_text("raise SystemExit")
    (tmp_path / "LICENSE.txt").write_text("free")
    (tmp_path / "label_names.json").write_text('{"0": "a"}')
    (tmp_path / ".hidden.jsonl").write_text("no")
    (tmp_path / "teacher").mkdir()
    jsonl(tmp_path / "teacher" / "vocabulary.jsonl", ROWS)
    source = load_source(DataConfig(dataset=str(tmp_path)))
    assert {split: len(part) for split, part in source.splits.items()} == {
        "train": 3,
        "validation": 3,
        "test": 1,
        "extra": 3,
    }


def test_text_files_alone_are_splits(tmp_path: Path) -> None:
    for name in ("train", "books"):
        write(tmp_path / f"{name}.txt")
    assert list(find_files(tmp_path)) == ["train", "books"]


def test_two_files_for_one_split(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "train.csv")
    with pytest.raises(SourceError, match=r"two files for the split train: train\.csv and train\.jsonl; remove one"):
        find_files(tmp_path)


def test_a_split_name_that_is_none(tmp_path: Path) -> None:
    jsonl(tmp_path / "my rows.jsonl", ROWS)
    with pytest.raises(SourceError, match=r"'my rows' cannot be a split.*--data-files SPLIT=PATTERN"):
        find_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "missing.jsonl: no such file or directory; expected a .jsonl"),
        ("./missing", "missing: no such file or directory"),
        ("../missing", "missing: no such file or directory"),
        ("~/missing-folder", "missing-folder: no such file or directory"),
        ("/nowhere/missing", "/nowhere/missing: no such file or directory"),
        ("a/b/c", "a/b/c: no such file or directory"),
        (
            "https://me:secret@127.0.0.1:9/a.jsonl",
            r"https://\*\*\*@127.0.0.1:9/a.jsonl: cannot be reached: .*; check the URL and the connection",
        ),
        ("nosuch://me:secret@host/a.jsonl", r"nosuch://\*\*\*@host/a.jsonl: cannot be opened: Protocol not known"),
    ],
)
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: pytest.fail("looked it up"))
    with pytest.raises(SourceError, match=message) as caught:
        load_source(DataConfig(dataset=name))
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_looks_like_a_path() -> None:
    assert all(looks_like_path(name) for name in ("a.csv", "x.jsonl.gz", "./a", "../a", "~/a", "/a", "a/b/c", "A.TXT"))
    assert not any(looks_like_path(name) for name in ("imdb", "org/name", "org/name-v1.5", "hf://datasets/org/name"))


def test_unknown_kind_of_file_and_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "d.xlsx").write_bytes(b"PK")
    with pytest.raises(SourceError, match=r"unknown kind of file; expected a \.jsonl"):
        find_files(tmp_path / "d.xlsx")
    with pytest.raises(SourceError, match=r"no data file there; expected a \.jsonl"):
        find_files(tmp_path)
    (tmp_path / "d.parquet.gz").write_bytes(b"")
    with pytest.raises(SourceError, match="unknown kind of file"):
        find_files(tmp_path / "d.parquet.gz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "d.jsonl",
            b'{"text": "a"}\nnonsense\n',
            "cannot be read as jsonl: line 2, column 1: Expecting value; repair the file",
        ),
        ("d.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2: .*surrogates not allowed"),
        ("d.jsonl", b'{"text": "a"}\n[1]\n', "line 2: expected an object, found list"),
        ("d.jsonl.gz", b"not gzip", "cannot be read as jsonl: "),
        ("d.csv", b'text,label\n"a,b\n', "cannot be read as csv: "),
        ("d.csv", "text,label\na,b\n".encode("utf-16"), "d.csv: cannot be read as csv: is UTF-16; save it as UTF-8$"),
        ("d.csv", b"PK\x03\x04\x14\x00\x06\n\r,\r\n", "d.csv: .*: is a spreadsheet or zip; save it as CSV$"),
        ("d.csv", b"text,label\na, b,x\n", "d.csv: rows have more fields than the first line; put quotes around"),
        ("d.csv", b"text,label\nx,a,\ny,b,\n", "d.csv: rows have more fields than the first line"),
        ("d.txt", b"a\n\xff\n", "cannot be read as txt: .*codec can't decode"),
        ("d.parquet", b"PAR1....", "cannot be read as parquet: "),
        ("d.jsonl", b"", "d.jsonl: no rows; expected at least one$"),
        ("d.json", b"[]", "d.json: no rows; expected at least one$"),
        ("d.csv", b"text,label\n", "d.csv: no rows; expected at least one$"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, name: str, content: bytes, message: str, capfd: Any) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        load_source(DataConfig(dataset=str(tmp_path / name)))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_nothing_is_printed(tmp_path: Path, capfd: Any) -> None:
    load_source(DataConfig(dataset=str(write(tmp_path / "d.jsonl"))))
    assert capfd.readouterr() == ("", "")


def test_an_edited_file_is_read_anew_though_its_time_is_the_same(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"text": "old"}])
    os.utime(path, (1_000_000, 1_000_000))
    assert texts(load_source(DataConfig(dataset=str(path)))) == ["old"]
    jsonl(path, [{"text": "new"}])
    os.utime(path, (1_000_000, 1_000_000))
    assert texts(load_source(DataConfig(dataset=str(path)))) == ["new"]


def test_signs_of_patterns_in_a_path_are_plain_signs(tmp_path: Path) -> None:
    folder = tmp_path / "a[1]*"
    folder.mkdir()
    assert texts(load_source(DataConfig(dataset=str(write(folder / "d.jsonl")))))[0] == "one"


def test_the_name_is_never_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data" / "news"
    folder.mkdir(parents=True)
    jsonl(folder / "train.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, name in {
        "data/news": "data/news",
        "./data/news/": "data/news",
        "data/news/train.jsonl": "data/news/train.jsonl",
        str(folder): "news",
        "~/data/news": "news",
        "data/../data/news": "news",
    }.items():
        assert load_source(DataConfig(dataset=given)).name == name
    monkeypatch.chdir(folder)
    assert load_source(DataConfig(dataset=".")).name == "news"


def test_hub_flags_do_not_go_with_a_path(tmp_path: Path) -> None:
    path = str(write(tmp_path / "d.jsonl"))
    for config in (DataConfig(dataset=path, dataset_config="x"), DataConfig(dataset=path, dataset_revision="main")):
        with pytest.raises(MisuseError, match="go with a hub data set, found a local path"):
            load_source(config)


# -------------------------------------------------------- files of one split with different columns


def put(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return name


LABELLED_CSV = "text,label\none,3\ntwo,4\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("no-label.csv", "text\nthree\n"),
        ("other-columns.csv", "id,text,date\n7,three,2020\n"),
        ("empty-labels.csv", "label,text\n,three\n"),
        ("semicolons.csv", "id;text\n7;three\n"),
        ("tabs.tsv", "id\ttext\n7\tthree\n"),
        ("no-label.jsonl", '{"text": "three", "id": 1}\n'),
        ("lines.txt", "three\n"),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_rows_of_a_file_without_labels_have_none(tmp_path: Path, name: str, content: str, order: int) -> None:
    files = [put(tmp_path, "labelled.csv", LABELLED_CSV), put(tmp_path, name, content)][::order]
    source = load_source(DataConfig(dataset=str(tmp_path), data_files=tuple(f"train={file}" for file in files)))
    labels = LabelMap.for_names(source, ("3", "4"))
    found = [(row.text, row.label) for row in read_examples(source, "train", 0, 3, labels)]
    parts = [[("one", 0), ("two", 1)], [("three", None)]][::order]
    assert found == [*parts[0], *parts[1]]
    assert label_names(source)[3:] == ("3", "4")


def test_a_parquet_file_beside_a_csv(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": ["b"], "text": ["two"]}), tmp_path / "b.parquet")
    put(tmp_path, "a.csv", "text,label\none,a\n")
    source = load_source(DataConfig(dataset=str(tmp_path), data_files=("train=a.csv", "train=b.parquet")))
    assert texts(source) == ["one", "two"]
    assert label_names(source) == ("a", "b")


@pytest.mark.parametrize("files", ["abc", "bac", "cba", "bb", "bbc"])
def test_labels_of_parquet_files_of_which_some_have_none(tmp_path: Path, files: str) -> None:
    pq.write_table(pa.table({"label": ["x", "y"], "text": ["a0", "a1"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["b0", "b1"]}), tmp_path / "b.parquet")
    put(tmp_path, "c.csv", "text,label\nc0,x\nc1,y\n")
    names = [f"train={name}.{'csv' if name == 'c' else 'parquet'}" for name in files]
    source = load_source(DataConfig(dataset=str(tmp_path), data_files=tuple(names)))
    labels = LabelMap.for_names(source, ("x", "y")) if source.columns.label else None
    found = [(row.text, row.label) for row in read_examples(source, "train", 0, 2 * len(files), labels)]
    assert found == [(f"{name}{i}", None if name == "b" else i) for name in files for i in range(2)]
    assert (source.columns.label is None) == (set(files) == {"b"})


@pytest.mark.parametrize("name", ["b.csv", "b.jsonl", "b.parquet"])
def test_a_file_without_the_text_column_is_named(tmp_path: Path, name: str) -> None:
    put(tmp_path, "a.csv", LABELLED_CSV)
    if name == "b.parquet":
        pq.write_table(pa.table({"body": ["x"]}), tmp_path / name)
    else:
        put(tmp_path, name, "label\n3\n" if name == "b.csv" else '{"label": 3}\n')
    data = DataConfig(dataset=str(tmp_path), data_files=("train=a.csv", f"train={name}"))
    with pytest.raises(
        SourceError, match=rf"{name}: no column 'text'; found \w+; rename a column, so that all files have the same"
    ):
        load_source(data)
    lone = DataConfig(dataset=str(tmp_path / name))
    with pytest.raises(SourceError, match=r"no column 'text'; found \w+; name the right one with --text-column$"):
        load_source(lone)


def test_a_file_without_names_of_columns_is_one_short_line(tmp_path: Path) -> None:
    put(tmp_path, "a.csv", '"' + "a text\nof two lines " * 20 + '"\n"b"\n')
    with pytest.raises(
        SourceError, match=r"^.*no column 'text'; found a text of two lines .{30,40}\.\.\.; name the"
    ) as caught:
        load_source(DataConfig(dataset=str(tmp_path / "a.csv")))
    assert "\n" not in str(caught.value)


def test_a_test_split_is_held_out_of_labelled_rows(tmp_path: Path) -> None:
    words = [f"text {i}" for i in range(60)]
    put(tmp_path, "a.csv", "text,label\n" + "".join(f"{word},{i % 2}\n" for i, word in enumerate(words[:40])))
    put(tmp_path, "b.csv", "id,text\n" + "".join(f"{i},{word}\n" for i, word in enumerate(words[20:])))
    alone = load_source(DataConfig(dataset=str(tmp_path / "a.csv"), holdout=0.3))
    data = DataConfig(dataset=str(tmp_path), data_files=("train=a.csv", "train=b.csv"), holdout=0.3)
    source = load_source(data)
    held = texts(alone, "test")
    assert set(texts(source, "test")) == set(held)  # rows of b.csv with the same text are held out too
    assert texts(source, "test")[: len(held)] == held
    assert not set(texts(source)) & set(held)
    assert len(source.splits["train"]) + len(source.splits["test"]) == 80


def test_classes_of_two_files_have_the_same_names(tmp_path: Path) -> None:
    for name, names in (("a", ["x", "y"]), ("b", ["y", "x"])):
        found = datasets.Dataset.from_dict({"text": [name], "label": [0]})
        found.cast_column("label", datasets.ClassLabel(names=names)).to_parquet(tmp_path / f"{name}.parquet")
    put(tmp_path, "c.csv", "text\nc\n")
    files = ("train=a.parquet", "train=c.csv", "train=b.parquet")
    with pytest.raises(SourceError, match="files have different class names"):
        load_source(DataConfig(dataset=str(tmp_path), data_files=files))


def test_semicolons_are_seen_in_the_first_line(tmp_path: Path) -> None:
    text = '\ufeff"Text, lang";Art\n"Grüße; bis bald";a\nohne, Anführung;b\n'
    put(tmp_path, "a.csv", text)
    source = load_source(DataConfig(dataset=str(tmp_path / "a.csv"), text_column="Text, lang", label_column="Art"))
    assert texts(source) == ["Grüße; bis bald", "ohne, Anführung"]
    put(tmp_path, "c.csv", "sep=;\ntext;label\none, two;1\n")
    source = load_source(DataConfig(dataset=str(tmp_path / "c.csv")))
    assert (texts(source), source.columns.label) == (["one, two"], "label")
    put(tmp_path, "b.csv", "text,a;b\none,1\n")
    assert load_source(DataConfig(dataset=str(tmp_path / "b.csv"))).splits["train"].column_names == ["text", "a;b"]


def test_a_semicolon_in_the_name_of_the_only_column(tmp_path: Path) -> None:
    put(tmp_path, "a.csv", "Ticket; text\nit is broken\nagain; or not\nno answer\n")
    source = load_source(DataConfig(dataset=str(tmp_path / "a.csv"), text_column="Ticket; text"))
    assert texts(source) == ["it is broken", "again; or not", "no answer"]
    put(tmp_path, "b.csv", 'text;label\n"one\ntwo";a\nthree\n')
    assert texts(load_source(DataConfig(dataset=str(tmp_path / "b.csv")))) == ["one\ntwo", "three"]
    put(tmp_path, "c.csv", "text;label\n" + "long " * 40_000 + ";a\n")
    assert load_source(DataConfig(dataset=str(tmp_path / "c.csv"))).splits["train"].column_names == ["text", "label"]


def test_names_that_end_with_a_comma_and_names_like_an_index(tmp_path: Path) -> None:
    put(tmp_path, "a.csv", "text,label,\nx,a,\ny,b,\n")
    assert texts(load_source(DataConfig(dataset=str(tmp_path / "a.csv")))) == ["x", "y"]
    put(tmp_path, "b.csv", "__index_level_0__,text\n0,x\n")
    assert texts(load_source(DataConfig(dataset=str(tmp_path / "b.csv")))) == ["x"]
    put(tmp_path, "c.csv", "text,label\nx, y,a\n")
    with pytest.raises(SourceError, match=r"c\.csv: rows have more fields"):
        load_source(DataConfig(dataset=str(tmp_path), data_files=("train=a.csv", "train=c.csv")))


@pytest.mark.parametrize("name", ["Label", " label"])
def test_a_label_column_that_is_spelt_otherwise_in_one_file(tmp_path: Path, name: str, caplog: Any) -> None:
    put(tmp_path, "a.csv", "text,label\none,x\n")
    put(tmp_path, "b.csv", f"text,{name}\ntwo,x\n")
    load_source(DataConfig(dataset=str(tmp_path), data_files=("train=a.csv", "train=b.csv")))
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"b.csv: column {name!r} is not read as the label column 'label': its 1 rows have no label" in said
