"""File layouts that `--dataset` accepts."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import DataConfig
from pipeline.errors import MisuseError, SourceError
from pipeline.sources import load_source
from pipeline.sources.batches import read_rows


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def put(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": list(texts)}), path)
    else:
        path.write_text(rows(*texts), encoding="utf-8")


def read(dataset: Path | str, **settings: object) -> dict[str, list[str]]:
    source = load_source(DataConfig(dataset=str(dataset), **settings))
    return {split: [row["text"] for row in read_rows(part, ["text"])] for split, part in source.splits.items()}


def test_a_clone_of_a_hub_repository(tmp_path: Path) -> None:
    put(tmp_path / "data" / "train-00000-of-00002.parquet", "a", "b")
    put(tmp_path / "data" / "train-00001-of-00002.parquet", "c")
    put(tmp_path / "data" / "test-00000-of-00001.parquet", "d")
    (tmp_path / "README.md").write_text("# rows\n")
    (tmp_path / ".git").mkdir()
    assert read(tmp_path) == {"train": ["a", "b", "c"], "test": ["d"]}


def test_the_configs_of_a_readme(tmp_path: Path) -> None:
    put(tmp_path / "x" / "one.parquet", "a")
    put(tmp_path / "x" / "two.parquet", "b")
    put(tmp_path / "other.parquet", "c")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: first\n  data_files:\n  - split: train\n    path: x/one.parquet\n"
        "  - split: test\n    path: x/two.parquet\n- config_name: second\n  data_files: other.parquet\n---\n"
    )
    assert read(tmp_path, dataset_config="first") == {"train": ["a"], "test": ["b"]}
    assert read(tmp_path, dataset_config="second") == {"train": ["c"]}
    with pytest.raises(SourceError, match="Config name is missing"):
        read(tmp_path)


def test_numbered_parts_are_one_split_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1, 0, *range(3, 10)):
        put(tmp_path / f"train-{number:05d}-of-00011.parquet", f"row {number}")
    put(tmp_path / "test-00000-of-00001.parquet", "t")
    assert read(tmp_path) == {"train": [f"row {i}" for i in range(11)], "test": ["t"]}


@pytest.mark.parametrize(
    "names", [["part-00000", "part-00001"], ["0000", "0001"], ["part-0-ab.c000", "part-1-cd.c000"]]
)
def test_parts_without_a_split_in_their_name_are_train(tmp_path: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        put(tmp_path / f"{name}.jsonl", f"row {i}")
    (tmp_path / "_SUCCESS").write_text("")
    assert read(tmp_path) == {"train": ["row 0", "row 1"]}


def test_a_missing_part_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "train-00000-of-00003.parquet", "a")
    put(tmp_path / "train-00002-of-00003.parquet", "c")
    with pytest.raises(SourceError, match=r"expected 3 parts \(-of-00003\), found 2; part 1 is missing"):
        read(tmp_path)
    (tmp_path / "data").mkdir()
    for path in tmp_path.glob("*.parquet"):
        path.rename(tmp_path / "data" / path.name)
    with pytest.raises(SourceError, match="part 1 is missing"):
        read(tmp_path)


def test_one_folder_for_each_split(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        put(tmp_path / split / "a.jsonl", f"{split} 1")
        put(tmp_path / split / "b.jsonl", f"{split} 2")
    assert read(tmp_path) == {split: [f"{split} 1", f"{split} 2"] for split in ("train", "validation", "test")}


def test_a_folder_named_as_a_split_beside_a_file(tmp_path: Path) -> None:
    put(tmp_path / "train.jsonl", "a")
    put(tmp_path / "test" / "x.jsonl", "b")
    assert read(tmp_path) == {"train": ["a"], "test": ["b"]}
    put(tmp_path / "train" / "y.jsonl", "c")
    with pytest.raises(SourceError, match=r"the split train is both a folder and a file \(train.jsonl\)"):
        read(tmp_path)


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    part = datasets.Dataset.from_dict({"text": ["a", "b"]})
    datasets.DatasetDict(train=part, test=part.select([1])).save_to_disk(tmp_path / "dict")
    part.save_to_disk(tmp_path / "single")
    assert read(tmp_path / "dict") == {"train": ["a", "b"], "test": ["b"]}
    assert read(tmp_path / "single") == {"train": ["a", "b"]}
    (tmp_path / "single" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(SourceError, match="cannot be read as a saved data set"):
        read(tmp_path / "single")


def test_a_glob(tmp_path: Path) -> None:
    for name in ("2024-1", "2024-2", "2025-1"):
        put(tmp_path / "logs" / f"{name}.jsonl", name)
    assert read(tmp_path / "logs" / "2024-*.jsonl") == {"train": ["2024-1", "2024-2"]}
    put(tmp_path / "s" / "train.jsonl", "a")
    put(tmp_path / "s" / "test.jsonl", "b")
    assert read(tmp_path / "s" / "*.jsonl") == {"train": ["a"], "test": ["b"]}  # never one split
    put(tmp_path / "s" / "extra.jsonl", "c")
    with pytest.raises(
        SourceError, match=r"matches test.jsonl, which is named as a split, and extra.jsonl, which is not"
    ):
        read(tmp_path / "s" / "*.jsonl")
    with pytest.raises(SourceError, match=r"2023-\*\.jsonl: no file matches"):
        read(tmp_path / "logs" / "2023-*.jsonl")


def test_data_files_say_which_files_are_which_split(tmp_path: Path) -> None:
    put(tmp_path / "tickets.jsonl", "a")
    put(tmp_path / "more" / "unlabelled.jsonl", "b")
    put(tmp_path / "gold" / "x.jsonl", "c")
    found = read(tmp_path, data_files=("train=tickets.jsonl", "train=more/*.jsonl", "test=gold/**"))
    assert found == {"train": ["a", "b"], "test": ["c"]}
    with pytest.raises(SourceError, match="no file matches"):
        read(tmp_path, data_files=("train=none/*.jsonl",))
    with pytest.raises(MisuseError, match=r"--data-files tickets.jsonl: expected SPLIT=PATTERN"):
        read(tmp_path, data_files=("tickets.jsonl",))


@pytest.mark.parametrize(("end", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed_files(tmp_path: Path, end: str, pack: object) -> None:
    (tmp_path / f"train.jsonl{end}").write_bytes(pack(rows("a", "b").encode()))  # type: ignore[operator]
    assert read(tmp_path) == {"train": ["a", "b"]}
    (tmp_path / f"train.jsonl{end}").write_bytes(pack(b'{"text": "a"}\nno\n'))  # type: ignore[operator]
    with pytest.raises(SourceError, match="line 2, column 1"):
        read(tmp_path)


def test_zstandard(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(rows("a", "b").encode()))
    assert read(tmp_path / "d.jsonl.zst") == {"train": ["a", "b"]}


def test_tab_separated_values_and_arrow_files(tmp_path: Path) -> None:
    (tmp_path / "d.tsv").write_text("text\tlabel\nNA\t1\nb, c\t2\n")
    assert read(tmp_path / "d.tsv") == {"train": ["NA", "b, c"]}
    with pa.OSFile(str(tmp_path / "d.arrow"), "wb") as sink:
        table = pa.table({"text": ["a"]})
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    assert read(tmp_path / "d.arrow") == {"train": ["a"]}


def test_a_directory_of_nothing_known(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.docx").write_text("x")
    with pytest.raises(SourceError, match="no data file there"):
        read(tmp_path)
