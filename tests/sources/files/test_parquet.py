"""Parquet sources are planned from their footers and read by row group.

They yield the same rows as `datasets`, and fetch nothing else.
"""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import DataConfig
from pipeline.errors import SourceError
from pipeline.records import Columns
from pipeline.sources import fingerprints, from_datasets, load_source
from pipeline.sources.batches import read_rows
from pipeline.sources.content import held_out
from pipeline.sources.files import parquet
from pipeline.sources.files.parquet import parquet_rows
from tests.support.ranges import served  # noqa: F401 - a fixture

NAMES = ["bad", "good", "so-so"]


def rows(count: int = 100, first: int = 0) -> datasets.Dataset:
    numbers = range(first, first + count)
    found = {
        "text": [f"text {i}" for i in numbers],
        "label": [i % 3 for i in numbers],
        "messages": [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": None}] for i in numbers],
        "unread": [b"x" * 50 for _ in numbers],
    }
    return datasets.Dataset.from_dict(found).cast_column("label", datasets.ClassLabel(names=NAMES))


def put(path: Path, found: datasets.Dataset, per_group: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    found.to_parquet(path, batch_size=per_group)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write 100 rows in two files and 17 row groups."""
    put(tmp_path / "data" / "train-00000-of-00002.parquet", rows(60), 7)
    put(tmp_path / "data" / "train-00001-of-00002.parquet", rows(40, 60), 5)
    return tmp_path / "data"


@pytest.mark.parametrize(("start", "stop"), [(0, 100), (0, 0), (58, 63), (7, 14), (99, 100), (33, 34)])
def test_rows_by_range_are_those_of_datasets(folder: Path, start: int, stop: int) -> None:
    source = load_source(DataConfig(dataset=str(folder)))
    found = source.splits["train"]
    assert (len(found), found.column_names) == (100, ["text", "label", "messages", "unread"])
    assert found.features == rows().features
    names = ["text", "label", "messages", "no such"]
    assert list(read_rows(found, names, start, stop)) == list(read_rows(rows(), names, start, stop))


def test_some_rows_by_range(folder: Path) -> None:
    chosen = np.flatnonzero(np.arange(100) % 3 == 1)
    found = load_source(DataConfig(dataset=str(folder))).splits["train"].select(chosen)
    again = found.select(np.arange(2, 30))
    plain = rows().select(chosen)
    assert list(read_rows(found, ["text"], 5, 31)) == list(read_rows(plain, ["text"], 5, 31))
    assert list(read_rows(again, ["text"])) == list(read_rows(plain, ["text"], 2, 30))
    assert len(found.starts) == 0


def test_few_row_groups_are_spread_and_whole(folder: Path) -> None:
    found = load_source(DataConfig(dataset=str(folder))).splits["train"]
    assert found.few_groups(3, 98, 3) == [range(3, 7), range(56, 60), range(95, 98)]
    assert [len(part) for part in found.few_groups(0, 100, 1000)] == [7] * 8 + [4] + [5] * 8
    chosen = found.select(np.arange(0, 100, 10))
    assert chosen.few_groups(0, 10, 2) == [range(1), range(9, 10)]


def test_a_held_out_split_is_that_of_the_same_rows_in_another_format(folder: Path, tmp_path: Path) -> None:
    source = load_source(DataConfig(dataset=str(folder), holdout=0.2))
    side = held_out(rows(), Columns(), 0.2)
    for split, chosen in (("train", ~side), ("test", side)):
        expected = rows().select(np.flatnonzero(chosen))
        assert list(read_rows(source.splits[split], ["text"])) == list(read_rows(expected, ["text"]))
    assert len(set(fingerprints(source).values())) == 2


def test_the_fingerprint_is_of_the_files(folder: Path, tmp_path: Path) -> None:
    def of(path: Path, **ranges: tuple[int, int]) -> str:
        return fingerprints(load_source(DataConfig(dataset=str(path))), ranges or None)["train"]

    whole = of(folder)
    assert whole.startswith("files-")
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    os.utime(next(moved.iterdir()))
    assert of(moved) == whole
    first_rows = of(moved, train=(0, 60))
    assert first_rows != whole
    put(moved / "train-00002-of-00003.parquet", rows(10, 100), 5)  # a new file at the end
    for i in range(2):
        (moved / f"train-0000{i}-of-00002.parquet").rename(moved / f"train-0000{i}-of-00003.parquet")
    assert of(moved, train=(0, 100)) == whole
    assert of(moved) != whole
    put(moved / "train-00001-of-00003.parquet", rows(40, 61), 5)  # edited
    assert of(moved, train=(0, 100)) != whole
    assert of(moved, train=(0, 60)) == first_rows


def test_names_of_classes_and_of_columns_count(tmp_path: Path) -> None:
    path = put(tmp_path / "d.parquet", rows(10), 5)
    named = load_source(DataConfig(dataset=str(path)))
    other = load_source(DataConfig(dataset=str(path), text_column="messages", messages_column="messages"))
    assert fingerprints(named) != fingerprints(other)
    renamed = rows(10).cast_column("label", datasets.Value("int64"))
    renamed = renamed.cast_column("label", datasets.ClassLabel(names=["x", "y", "z"]))
    assert fingerprints(load_source(DataConfig(dataset=str(put(path, renamed, 5))))) != fingerprints(named)


def test_types_are_those_of_the_first_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": pa.array([1], pa.int64())}), tmp_path / "part-0.parquet")
    pq.write_table(
        pa.table({"label": pa.array([2], pa.int32()), "text": pa.array(["b"], pa.large_string())}),
        tmp_path / "part-1.parquet",
    )
    found = load_source(DataConfig(dataset=str(tmp_path))).splits["train"]
    assert list(read_rows(found, ["text", "label"])) == [{"text": "a", "label": 1}, {"text": "b", "label": 2}]
    pq.write_table(pa.table({"text": ["c"], "label": ["three"]}), tmp_path / "part-2.parquet")
    found = load_source(DataConfig(dataset=str(tmp_path))).splits["train"]
    with pytest.raises(SourceError, match=r"part-2.parquet: row group 0 cannot be read: .*three.*; repair the file"):
        list(read_rows(found, ["label"]))


def test_a_column_that_some_file_lacks_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": ["x"], "id": [1]}), tmp_path / "part-0.parquet")
    pq.write_table(pa.table({"text": ["b"], "label": ["y"]}), tmp_path / "part-1.parquet")
    source = load_source(DataConfig(dataset=str(tmp_path)))
    assert source.columns.label == "label"
    assert "column 'id' is not in every file and is not read" in caplog.text


def test_rows_of_a_file_without_labels_have_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": ["x"]}), tmp_path / "part-0.parquet")
    pq.write_table(pa.table({"id": [1, 2], "text": ["b", "c"]}), tmp_path / "part-1.parquet")
    pq.write_table(pa.table({"text": ["d"], "label": ["y"]}), tmp_path / "part-2.parquet")
    caplog.set_level("INFO")
    source = load_source(DataConfig(dataset=str(tmp_path)))
    found = list(read_rows(source.splits["train"], ["text", "label"]))
    assert found == [{"text": t, "label": y} for t, y in zip("abcd", ["x", None, None, "y"], strict=True)]
    assert source.row_groups == {"train": [0, 1, 3]}
    assert "2 of 4 rows are in files without a column 'label' and have no label" in caplog.text


@pytest.mark.parametrize("damage", ["empty", "cut", "not parquet"])
def test_a_damaged_file_is_one_line(tmp_path: Path, damage: str) -> None:
    path = put(tmp_path / "d.parquet", rows(10), 5)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": whole[:-9], "not parquet": b"text,label\n" * 9}[damage])
    with pytest.raises(SourceError, match=r"d.parquet: (no rows|cannot be read as parquet)") as caught:
        load_source(DataConfig(dataset=str(path)))
    assert "\n" not in str(caught.value)


def test_a_long_footer_takes_a_second_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "d.parquet", rows(10), 5)
    monkeypatch.setattr(parquet, "_TAIL_BYTES", 100)
    assert len(parquet_rows([str(path)])) == 10


def test_a_file_that_changed_since_is_refused(folder: Path) -> None:
    found = load_source(DataConfig(dataset=str(folder))).splits["train"]
    put(folder / "train-00001-of-00002.parquet", rows(39, 60), 5)
    with pytest.raises(SourceError, match=r"00001-of-00002\.parquet: the file has changed since its footer was read"):
        list(read_rows(found, ["text"]))


# ------------------------------------------------------------------------------ behind a web server


def test_only_the_footer_and_the_columns_of_one_row_group_are_fetched(served) -> None:
    texts = [f"{i} " + "word " * 400 for i in range(400)]
    table = pa.table({"text": texts, "unread": [str(i) * 3000 for i in range(400)]})
    layout = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, served.folder / "big.parquet", row_group_size=10, **layout)
    size = (served.folder / "big.parquet").stat().st_size
    source = load_source(DataConfig(dataset=f"{served.url}/big.parquet"))
    assert source.name == f"{served.url}/big.parquet"
    footers = served.bytes_of("big.parquet")
    assert footers <= 64 << 10
    found = source.splits["train"]
    assert [row["text"] for row in read_rows(found, ["text"], 205, 207)] == texts[205:207]
    fetched = served.bytes_of("big.parquet") - footers
    assert 20_000 < fetched < 22_000  # ten texts of 2 kB, of a file of 4 MB
    assert fetched < size / 100
    list(read_rows(found, ["text"], 207, 210))
    assert served.bytes_of("big.parquet") == footers + fetched  # the latest row group is kept


def test_a_server_without_ranges_and_a_file_that_is_not_there(served) -> None:
    put(served.folder / "d.parquet", rows(10), 5)
    with pytest.raises(SourceError, match=r"/none.parquet: not found, or access denied"):
        load_source(DataConfig(dataset=f"{served.url}/none.parquet"))
    served.with_ranges = False
    with pytest.raises(SourceError, match="does not serve ranges of bytes; download the file and give its path"):
        load_source(DataConfig(dataset=f"{served.url}/d.parquet"))


def test_another_file_under_the_same_address_is_noticed(served) -> None:
    path = put(served.folder / "d.parquet", rows(10), 5)
    found = load_source(DataConfig(dataset=f"{served.url}/d.parquet")).splits["train"]
    os.utime(path, ns=(1, 1))  # the server's ETag
    with pytest.raises(SourceError, match="has changed since its footer was read; run the same command again"):
        list(read_rows(found, ["text"]))


# ---------------------------------------------------------------------------------------- streaming


def test_a_stream_of_parquet_files_is_read_in_place(folder: Path) -> None:
    stream = datasets.load_dataset("parquet", data_files=str(folder / "*.parquet"), streaming=True)
    source = from_datasets(stream, Columns())
    assert list(read_rows(source.splits["train"], ["text"])) == list(read_rows(rows(), ["text"]))
    assert from_datasets(stream["train"], Columns()).splits["train"].features == rows().features
    assert fingerprints(source) == fingerprints(load_source(DataConfig(dataset=str(folder))))


def test_a_stream_of_some_of_the_files(folder: Path) -> None:
    stream = datasets.load_dataset("parquet", data_files=str(folder / "*.parquet"), streaming=True, split="train")
    second = from_datasets(stream.shard(num_shards=2, index=1), Columns()).splits["train"]
    assert list(read_rows(second, ["text"])) == list(read_rows(rows(40, 60), ["text"]))


@pytest.mark.parametrize(
    "changed",
    [
        lambda stream: stream.map(lambda row: row),
        lambda stream: stream.filter(lambda row: True),
        lambda stream: stream.shuffle(seed=1),
        lambda stream: stream.take(3),
        lambda stream: stream.skip(3),
        lambda stream: datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(),
    ],
)
def test_any_other_stream_is_refused(folder: Path, changed) -> None:
    stream = datasets.load_dataset("parquet", data_files=str(folder / "*.parquet"), streaming=True, split="train")
    with pytest.raises(SourceError, match="expected Parquet files as they are, without map, filter or shuffle"):
        from_datasets(changed(stream), Columns())
