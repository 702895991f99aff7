import hashlib
import itertools
import json
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.records import Columns, SplitContents
from pipeline.sources import batches, fingerprints, from_datasets, survey
from pipeline.sources.content import held_out
from tests.support.profile import examples

TEXTS = st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=40)
SETTINGS = settings(max_examples=examples(25, 250), deadline=None)


def frame(texts: list[str], **more: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": texts, **more})


def in_chunks(texts: list[str], cuts: list[int]) -> datasets.Dataset:
    """Return the same rows in other Arrow chunks."""
    edges = [0, *sorted(min(cut, len(texts)) for cut in cuts), len(texts)]
    chunks = [pa.array(texts[a:b], pa.string()) for a, b in itertools.pairwise(edges)]
    return datasets.Dataset(pa.table({"text": pa.chunked_array(chunks, pa.string())}))


def fingerprint(dataset: datasets.Dataset, columns: Columns = Columns()) -> str:  # noqa: B008 - frozen
    return fingerprints(from_datasets(dataset, columns))["train"]


@pytest.mark.full
@SETTINGS
@given(TEXTS, st.lists(st.integers(0, 40), max_size=4), st.integers(1, 9))
def test_chunks_and_batches_play_no_part(texts: list[str], cuts: list[int], batch: int) -> None:
    expected = fingerprint(frame(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "BATCH_ROWS", batch)
        assert fingerprint(in_chunks(texts, cuts)) == expected


@SETTINGS
@given(TEXTS, TEXTS)
def test_equal_fingerprints_mean_equal_rows(a: list[str], b: list[str]) -> None:
    assert (fingerprint(frame(a)) == fingerprint(frame(b))) == (a == b)


@SETTINGS
@given(TEXTS, TEXTS, st.floats(0.05, 0.95), st.randoms())
def test_a_row_keeps_its_side(texts: list[str], more: list[str], share: float, random: Any) -> None:
    side = dict(zip(texts, held_out(frame(texts), Columns(), share).tolist(), strict=True))
    every = [*texts, *more]
    random.shuffle(every)
    found = held_out(frame(every), Columns(), share)
    assert [side[text] for text in every if text in side] == [
        bool(held) for text, held in zip(every, found, strict=True) if text in side
    ]
    larger = held_out(frame(every), Columns(), min(1.0, share * 1.5))
    assert not (found & ~larger).any()


def test_the_share_is_about_what_was_asked_for() -> None:
    held = held_out(frame([f"text {i}" for i in range(4000)]), Columns(), 0.1)
    assert held.dtype == np.bool_
    assert 340 <= held.sum() <= 460  # 400 +- 3 standard deviations


def test_labels_and_kept_columns_do_not_move_a_row() -> None:
    texts = [f"text {i}" for i in range(50)]
    one = held_out(frame(texts, label=[0] * 50, id=list(range(50))), Columns(keep=("id",)), 0.3)
    assert (one == held_out(frame(texts, label=[1] * 50), Columns(), 0.3)).all()


def test_only_what_is_read_counts() -> None:
    base = fingerprint(frame(["a", "b"], label=["x", "y"], id=[1, 2]))
    assert fingerprint(frame(["a", "b"], label=["x", "y"], id=[3, 4])) == base
    assert fingerprint(datasets.Dataset.from_dict({"label": ["x", "y"], "text": ["a", "b"]})) == base
    renamed = datasets.Dataset.from_dict({"body": ["a", "b"], "topic": ["x", "y"]})
    assert fingerprint(renamed, Columns(text="body", label="topic")) == base
    keep = Columns(keep=("id",))
    others = {
        fingerprint(frame(["b", "a"], label=["y", "x"])),
        fingerprint(frame(["a", "b"], label=["x", "z"])),
        fingerprint(frame(["a", "b"], label=["x", None])),
        fingerprint(frame(["a", "b"])),
        fingerprint(frame(["a", "b"], label=["x", "y"], id=[1, 2]), keep),
        fingerprint(frame(["a", "b"], label=["x", "y"], id=[3, 4]), keep),
        fingerprint(frame(["x", "y"], label=["a", "b"])),
    }
    assert base not in others
    assert len(others) == 7


def test_names_of_classes_count() -> None:
    def named(*names: str) -> str:
        features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=list(names)))
        return fingerprint(datasets.Dataset.from_dict({"text": ["a"], "label": [0]}, features=features))

    assert named("no", "yes") != named("yes", "no")


def test_chats_are_hashed_by_role_and_content() -> None:
    def chat(turn: dict[str, Any]) -> str:
        return fingerprint(datasets.Dataset.from_dict({"chat": [[turn]]}), Columns(messages="chat"))

    base = chat({"role": "user", "content": "hi"})
    assert chat({"content": "hi", "role": "user", "name": None}) == base
    assert chat({"role": "user", "content": "ho"}) != base
    assert chat({"role": "user", "content": "hi", "tool_calls": ["f"]}) != base


def test_the_fingerprint_is_a_sha256_that_will_not_change() -> None:
    """Resuming a cache compares fingerprints, so their definition is part of the format."""
    lines = [[["text", None]], ["a"], ["é"]]
    expected = b"".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n" for line in lines)
    assert fingerprint(frame(["a", "é"])) == hashlib.sha256(expected).hexdigest()


def test_bytes_that_are_not_text_are_hashed_too() -> None:
    raw = pa.array([b"ok", b"\xff\xfe"]).view(pa.string())
    dataset = datasets.Dataset(pa.table({"text": raw}))
    assert fingerprint(dataset) != fingerprint(frame(["ok", ""]))
    assert held_out(dataset, Columns(), 0.5).shape == (2,)


def test_a_survey_counts_and_has_the_same_fingerprints() -> None:
    train = frame(["a", "b", "b", "  ", "c"], label=["x", None, "y", "x", "y"])
    test = frame(["b", "c", "d", " \n"], label=["y", "x", None, None])
    source = from_datasets(datasets.DatasetDict(train=train, test=test), Columns(label="label"))
    found = survey(source, {"train": (0, 5), "test": (0, 4)})
    assert found.fingerprints == fingerprints(source)
    assert found.contents.splits == {"train": SplitContents(5, 1, 1), "test": SplitContents(4, 2, 1)}
    assert found.contents.shared == {"train, test": 2}  # b and c, whatever their labels


def test_a_survey_reads_the_rows_asked_for() -> None:
    source = from_datasets(datasets.DatasetDict(train=frame(["a", "b"]), test=frame(["b", "a"])), Columns())
    found = survey(source, {"train": (0, 1), "test": (0, 1)})
    assert found.contents.shared == {}
    assert found.contents.splits["train"] == SplitContents(1, None, 0)
    assert found.fingerprints == fingerprints(source, {"train": (0, 1), "test": (0, 1)})
