"""File layouts behind URLs follow the same rules as local directories."""

from __future__ import annotations

import datasets
import fsspec
import pytest
from huggingface_hub import constants

from pipeline.config import DataConfig
from pipeline.errors import MisuseError, SourceError
from pipeline.sources import load_source
from pipeline.sources.batches import read_rows
from pipeline.sources.files.remote import find_urls
from tests.support.hub import TOKEN, hub  # noqa: F401 - a fixture
from tests.support.ranges import served  # noqa: F401 - a fixture
from tests.support.s3 import bucket, s3_server  # noqa: F401 - fixtures


def put(url: str, *texts: str) -> None:
    """Write a file with one column to any file system."""
    table = datasets.Dataset.from_dict({"text": list(texts)})
    with fsspec.open(url, "wb") as handle:
        table.to_parquet(handle) if url.endswith(".parquet") else table.to_json(handle)


def read(url: str, **settings: object) -> dict[str, list[str]]:
    source = load_source(DataConfig(dataset=url, **settings))
    return {split: [row["text"] for row in read_rows(part, ["text"])] for split, part in source.splits.items()}


@pytest.fixture
def memory(request):
    """Return the URL of an empty folder in fsspec's memory file system."""
    filesystem = fsspec.filesystem("memory")
    yield f"memory://folder-{abs(hash(request.node.name)):x}"
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


@pytest.mark.parametrize(
    ("files", "asked", "expected"),
    [
        ({"a.parquet": ["a"]}, "a.parquet", {"train": ["a"]}),
        ({"train.parquet": ["a"], "test.parquet": ["b"]}, "", {"train": ["a"], "test": ["b"]}),
        ({"part-10.parquet": ["b"], "part-2.parquet": ["a"]}, "", {"train": ["a", "b"]}),
        ({"part-10.parquet": ["b"], "part-2.parquet": ["a"]}, "part-*.parquet", {"train": ["a", "b"]}),
        ({"train/0.parquet": ["a"], "test/0.parquet": ["b"]}, "", {"train": ["a"], "test": ["b"]}),
        (
            {"data/train-00000-of-00001.parquet": ["a"], "data/test-00000-of-00001.parquet": ["b"]},
            "",
            {"train": ["a"], "test": ["b"]},
        ),
        ({"a/b/c.parquet": ["a"]}, "a/b/*.parquet", {"train": ["a"]}),
        ({"train.parquet": ["a"], ".hidden.parquet": ["x"], "_tmp.parquet": ["x"]}, "", {"train": ["a"]}),
    ],
)
def test_layouts(memory, files, asked, expected):
    for name, texts in files.items():
        put(f"{memory}/{name}", *texts)
    assert read(f"{memory}/{asked}".rstrip("/")) == expected


def test_files_named_by_split(memory):
    put(f"{memory}/2024/a.parquet", "a")
    put(f"{memory}/2025/b.parquet", "b")
    put(f"{memory}/held.parquet", "c")
    found = read(memory, data_files=("train=202*/*.parquet", "test=held.parquet"))
    assert found == {"train": ["a", "b"], "test": ["c"]}
    with pytest.raises(SourceError, match=r"none\*: no file matches"):
        read(memory, data_files=("train=none*",))


def test_the_configs_of_a_readme(memory):
    put(f"{memory}/one/x.parquet", "a")
    put(f"{memory}/two/x.parquet", "b")
    configs = "configs:\n- config_name: first\n  data_files: one/*.parquet\n- config_name: second\n  data_files: two/*.parquet\n"
    with fsspec.open(f"{memory}/README.md", "w") as handle:
        handle.write(f"---\n{configs}---\n")
    assert read(memory, dataset_config="second") == {"train": ["b"]}
    with pytest.raises(SourceError, match="expected one of the configurations first, second, found none; name one"):
        read(memory)


def test_nothing_there_and_misuse(memory):
    with pytest.raises(SourceError, match=r"none: not found, or access denied; expected a \.jsonl"):
        read(f"{memory}/none")
    put(f"{memory}/a.parquet", "a")
    with pytest.raises(MisuseError, match="--dataset-config goes with a hub data set or a README with configs"):
        read(memory, dataset_config="en")
    with pytest.raises(MisuseError, match="--dataset-revision goes with a hub data set, found a URL"):
        read(memory, dataset_revision="main")


@pytest.fixture
def online(monkeypatch):
    """Let `datasets` fetch files, for servers on loopback."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("online")
def test_other_formats_go_through_datasets(served):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_json(served.folder / "d.jsonl")
    assert read(f"{served.url}/d.jsonl") == {"train": ["a", "b"]}


def test_a_signature_stands_in_no_name(served):
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(served.folder / "d.parquet")
    source = load_source(DataConfig(dataset=f"{served.url}/d.parquet?X-Amz-Signature=secret"))
    assert source.name == f"{served.url}/d.parquet"
    assert [row["text"] for row in read_rows(source.splits["train"], ["text"])] == ["a"]


@pytest.mark.usefixtures("online")
def test_a_bucket(bucket):
    put(f"{bucket}/d/train-00000-of-00002.parquet", "a")
    put(f"{bucket}/d/train-00001-of-00002.parquet", "b")
    put(f"{bucket}/d/test-00000-of-00001.parquet", "c")
    assert read(f"{bucket}/d") == {"train": ["a", "b"], "test": ["c"]}
    assert find_urls(f"{bucket}/d")["test"] == (f"{bucket}/d/test-00000-of-00001.parquet",)
    put(f"{bucket}/e/x.jsonl", "d")
    assert read(f"{bucket}/e/x.jsonl") == {"train": ["d"]}


@pytest.fixture
def news(hub, tmp_path, online, monkeypatch):
    """Create a hub repository in its usual layout, and return its commit."""
    files = {"README.md": ("regular", b"---\nlicense: mit\n---\n# news\n")}
    for name, texts in {"train-00000-of-00001": ["a", "b"], "test-00000-of-00001": ["c"]}.items():
        datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "x.parquet")
        files[f"data/{name}.parquet"] = ("lfs", (tmp_path / "x.parquet").read_bytes())
    hub.private["org/news"] = False
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", constants.ENDPOINT)
    return hub.commit("org/news", "main", files)


@pytest.mark.parametrize("name", ["org/news", "hf://datasets/org/news", "hf://datasets/org/news@main"])
def test_a_hub_data_set_of_parquet_files_is_read_in_place(hub, news, name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("downloaded it"))
    source = load_source(DataConfig(dataset=name))
    assert (source.name, source.revision) == ("org/news", news)
    assert {split: len(part) for split, part in source.splits.items()} == {"train": 2, "test": 1}
    assert [row["text"] for row in read_rows(source.splits["train"], ["text"])] == ["a", "b"]
    assert not any(TOKEN in request for request in hub.requests)


def test_some_files_of_a_hub_repository(hub, news):
    assert read("hf://datasets/org/news/data/test-00000-of-00001.parquet") == {"train": ["c"]}
    assert read("hf://datasets/org/news/data") == {"train": ["a", "b"], "test": ["c"]}
