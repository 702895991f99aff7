"""Image columns in the layouts that users have."""

from __future__ import annotations

import json

import pytest

from pipeline.config import DataConfig
from pipeline.config.data import over
from pipeline.errors import MisuseError, SourceError
from pipeline.records import BadRow, Tokenization
from pipeline.sources import from_datasets, load_source, read_examples, survey
from pipeline.tasks import get_task
from tests.support.pictures import data_set, folders, pictures

FOUND = pictures(0, 9)
BYTES = [image["bytes"] for image in FOUND["image"]]


def read(source, split="train"):
    return list(read_examples(source, split, 0, len(source.splits[split]), None))


def load(path, column="image", **settings):
    return load_source(DataConfig(dataset=str(path), image_column=column, **settings))


def as_files(folder):
    """Write nine files to `folder/files`."""
    (folder / "files").mkdir(parents=True)
    for image in FOUND["image"]:
        (folder / "files" / image["path"]).write_bytes(image["bytes"])
    return folder


def test_folders_of_classes(tmp_path):
    source = load(folders(tmp_path / "data", train=FOUND, test=pictures(1, 4)))
    assert list(source.splits) == ["train", "test"]
    assert source.splits["train"].features["label"].names == ["blue", "green", "red"]
    assert sorted(row.image.data for row in read(source)) == sorted(BYTES)
    assert read(source)[0].image.file == f"data/train/blue/{read(source)[0].image.path}"


def test_a_metadata_file_beside_the_images(tmp_path):
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    lines = []
    for image, label in zip(FOUND["image"], FOUND["label"], strict=True):
        (folder / image["path"]).write_bytes(image["bytes"])
        lines.append(json.dumps({"file_name": image["path"], "label": label}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    source = load(tmp_path / "data")
    assert [row.image.data for row in read(source)] == BYTES
    assert source.columns.label == "label"


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_paths_are_relative_to_the_data_file(tmp_path, suffix):
    as_files(tmp_path / "data")
    names = [f"files/{image['path']}" for image in FOUND["image"]]
    text = "picture\n" + "\n".join(names) if suffix == "csv" else "\n".join(json.dumps({"picture": n}) for n in names)
    (tmp_path / "data" / f"train.{suffix}").write_text(text + "\n")
    for path in (tmp_path / "data", tmp_path / "data" / f"train.{suffix}"):
        assert [row.image.data for row in read(load(path, "picture"))] == BYTES


def test_parquet_files_are_read_in_place_with_images_and_with_bytes(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    data_set(train=FOUND)["train"].to_parquet(tmp_path / "images.parquet")
    pq.write_table(pa.table({"image": pa.array(BYTES, pa.binary())}), tmp_path / "bytes.parquet")
    for name in ("images", "bytes"):
        source = load(tmp_path / f"{name}.parquet")
        assert [row.image.data for row in read(source)] == BYTES
        assert survey(source, {"train": (0, 9)}).fingerprints["train"].startswith("files-")


def test_data_sets_in_memory_and_saved(tmp_path):
    rows = data_set(train=FOUND)
    rows.save_to_disk(tmp_path / "saved")
    for source in (
        from_datasets(rows, DataConfig(dataset="x", image_column="image").columns),
        load(tmp_path / "saved"),
    ):
        assert [row.image.data for row in read(source)] == BYTES


def test_a_fingerprint_is_of_the_bytes_and_not_of_where_they_lie(tmp_path):
    first = load(folders(tmp_path / "one", train=FOUND))
    second = load(folders(tmp_path / "two", train=FOUND))
    found = survey(first, {"train": (0, 9)}).fingerprints
    assert found == survey(second, {"train": (0, 9)}).fingerprints
    path = next((tmp_path / "two" / "train" / "red").iterdir())
    path.write_bytes(BYTES[0] if path.read_bytes() != BYTES[0] else BYTES[1])
    assert found != survey(load(tmp_path / "two"), {"train": (0, 9)}).fingerprints


def test_equal_images_of_two_splits_are_counted_and_held_out_together(tmp_path):
    twice = {"image": FOUND["image"] * 2, "label": FOUND["label"] * 2}
    source = from_datasets(data_set(train=twice), DataConfig(dataset="x", image_column="image").columns, holdout=0.4)
    sides = [{row.image.data for row in read(source, split)} for split in ("train", "test")]
    assert not sides[0] & sides[1]
    both = from_datasets(data_set(train=FOUND, test=twice), DataConfig(dataset="x", image_column="image").columns)
    assert survey(both, {"train": (0, 9), "test": (0, 18)}).contents.shared == {"train, test": 9}


def test_rows_without_a_file_are_bad_rows_that_name_no_directory(tmp_path):
    (tmp_path / "train.csv").write_text("image\nnone.png\n")
    (bad,) = read(load(tmp_path / "train.csv"))
    assert isinstance(bad, BadRow)
    assert bad.reason == "image: none.png: No such file or directory"


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ({"image": [1, 2]}, "expected images, bytes or paths of files, found integers"),
        ({"text": ["a"]}, "no column 'image'"),
    ],
)
def test_columns_that_hold_no_images(rows, match):
    from datasets import Dataset

    with pytest.raises(SourceError, match=match):
        from_datasets(Dataset.from_dict(rows), DataConfig(dataset="x", image_column="image").columns)


def test_paths_in_a_parquet_file_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": ["a.png"]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="name the files of images in CSV or JSON Lines, or embed them"):
        load(tmp_path / "a.parquet")


def test_places_of_files_are_below_the_directory_that_people_share(tmp_path, monkeypatch):
    """Stored paths are relative to the directory that users share.

    Paths in a folder start with its name, and paths in a table are relative to the table's
    location. The same holds through links.
    """
    as_files(tmp_path / "data")
    (tmp_path / "data" / "rows.csv").write_text("file\nfiles/000.png\nfiles/../files/001.png\n")
    monkeypatch.chdir(tmp_path)
    for dataset, before in (("data/rows.csv", "data/"), ("data/../data/rows.csv", "")):
        rows = read(load(dataset, "file"))
        assert [row.image.file for row in rows] == [f"{before}files/000.png", f"{before}files/001.png"]
    assert read(load(tmp_path / "data" / "rows.csv", "file"))[0].image.file == "files/000.png"
    (tmp_path / "link").symlink_to(folders(tmp_path / "photos", train=FOUND))
    found = read(load(tmp_path / "link"))[0].image.file
    assert found.startswith(("link/train/", "photos/train/"))


def test_a_directory_that_is_not_here_is_not_found_among_those_read_before(tmp_path, monkeypatch):
    load(folders(tmp_path / "photos", train=FOUND))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match="photos"):
        load("photos")


def test_folders_that_are_not_read_and_stray_images_are_told(tmp_path, caplog):
    mixed = folders(tmp_path / "mixed", train=FOUND)
    (mixed / "train" / "stray.png").write_bytes(BYTES[0])
    with pytest.raises(SourceError, match=r"stray\.png is outside the folders of the classes"):
        load(mixed)
    odd = tmp_path / "odd"
    for name, image in zip(("train", "car", "plane"), BYTES, strict=False):
        (odd / name).mkdir(parents=True)
        (odd / name / "1.png").write_bytes(image)
    load(odd)
    assert "1 of 3 images are read, as the splits train" in caplog.text


def test_a_broken_image_of_a_folder_is_named_by_its_place(tmp_path):
    data = folders(tmp_path / "photos", train=FOUND)
    (broken, *_) = sorted(data.rglob("*.png"))
    broken.write_bytes(BYTES[0][:40])
    source = load(data)
    (reason,) = [
        row.reason
        for example in read_examples(source, "train", 0, len(source.splits["train"]), None)
        for row in get_task("image-classification").tokenize([example], "train", None, Tokenization(1))
        if isinstance(row, BadRow)
    ]
    assert reason.startswith(f"photos/{broken.relative_to(data).as_posix()}: cannot be decoded")


def test_a_text_column_beside_images_is_refused():
    with pytest.raises(
        MisuseError, match="--text-column body: one kind of input at a time, found the column image too"
    ):
        _ = DataConfig(dataset="x", image_column="image", text_column="body").columns
    assert over({"text_column": "body", "label_column": "y"}, {"image_column": "image"}) == {
        "label_column": "y", "image_column": "image",
    }  # fmt: skip


def test_a_table_beside_images_is_read_as_a_table(tmp_path):
    as_files(tmp_path / "data")
    (tmp_path / "data" / "train.csv").write_text("file,label\nfiles/000.png,red\n")
    (row,) = read(load(tmp_path / "data", "file"))
    assert row.image.data == BYTES[0]
