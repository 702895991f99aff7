from pathlib import Path
from typing import Any

import datasets
import pytest

from pipeline.config import DataConfig
from pipeline.errors import SourceError
from pipeline.sources import load_source
from pipeline.sources.files.loading import reason, redact

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def in_cache(folder: Path, rows: int = 2) -> datasets.Dataset:
    """Return a memory-mapped data set as `datasets` stores it, in a folder named by the commit."""
    path = folder / "org___news" / "default" / "0.0.0" / COMMIT
    datasets.Dataset.from_dict({"text": ["a"] * rows}).save_to_disk(path)
    return datasets.Dataset.from_file(str(next(path.glob("*.arrow"))))


def test_a_hub_name_goes_to_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> datasets.DatasetDict:
        calls.append((args, kwargs))
        return datasets.DatasetDict({"train": in_cache(tmp_path), "test": in_cache(tmp_path / "t", 1)})

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = load_source(DataConfig(dataset="org/news", dataset_config="en", dataset_revision="v2", split=("test",)))
    assert calls == [(("org/news", "en"), {"revision": "v2"})]
    assert (source.name, source.config, source.revision) == ("org/news", "en", COMMIT)
    assert {split: len(part) for split, part in source.splits.items()} == {"test": 1}


def test_the_revision_asked_for_where_the_commit_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    found = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: found)
    assert load_source(DataConfig(dataset="org/news", dataset_revision="v2")).revision == "v2"
    assert load_source(DataConfig(dataset="org/news")).revision is None


def test_another_commit_from_the_cache_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.DatasetDict({"train": in_cache(tmp_path)}))
    with pytest.raises(SourceError, match=f"expected revision {'f' * 40}, found {COMMIT} in the local cache"):
        load_source(DataConfig(dataset="org/news", dataset_revision="f" * 40))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'org/news' doesn't exist"),
            "doesn't exist; check the name.*hf auth login",
        ),
        (ConnectionError("Couldn't reach 'org/news'"), "Couldn't reach 'org/news'; check the connection, or download"),
        (
            ValueError("Config name is missing.\nPlease pick one among ['a', 'b']"),
            r"missing. Please pick one among \['a', 'b'\]; name one .*--dataset-config",
        ),
        (OSError("disk full"), "disk full; check the name"),
    ],
)
def test_failures_are_one_line_with_a_hint(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        SourceError, match=f"^org/news: cannot be loaded from the Hugging Face hub: .*{message}"
    ) as caught:
        load_source(DataConfig(dataset="org/news"))
    assert "\n" not in str(caught.value)


def test_the_real_call_offline() -> None:
    with pytest.raises(SourceError, match=r"org/no-such-data-set: cannot be loaded.*check the connection"):
        load_source(DataConfig(dataset="org/no-such-data-set"))


def test_credentials_are_redacted() -> None:
    assert redact("token hf_abcdefghij0123 at https://me:pw@host/x?sig=1&k=2 end") == (
        "token hf_*** at https://***@host/x?*** end"
    )
    assert redact("a plain @ sentence? yes") == "a plain @ sentence? yes"
    outer = RuntimeError("outer")
    outer.__cause__ = ValueError("inner\n  text")
    assert reason(outer) == "inner text"
    assert reason(KeyError()) == "KeyError"
    assert len(reason(ValueError("x" * 1000))) < 400
