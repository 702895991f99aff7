"""Empty, cut, repetitive and duplicate completions are found, counted and dropped.

The result does not depend on the number of workers.
"""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CacheError
from pipeline.generation.faults import is_repeated, longest_run
from pipeline.generation.finish import _Tally
from pipeline.generation.run import run
from tests.support.generations import config, hashes  # noqa: F401 - a fixture
from tests.support.processes import forked  # noqa: F401 - a fixture


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (list(range(200)), False),
        ([7] * 19, False),
        ([7] * 20, True),
        ([1, 2, 3] * 6, False),  # 18 tokens
        ([1, 2, 3] * 7, True),
        ([9, 8, *([1, 2, 3] * 7), 5, 6], True),
        (list(range(10)) * 3, False),
        (list(range(10)) * 4, True),
        (list(range(64)) * 4, True),
        (list(range(65)) * 4, False),
        ([], False),
    ],
)
def test_an_ngram_that_loops_is_found(ids, expected):
    assert is_repeated(np.array(ids, dtype=np.int32)) is expected


@given(st.lists(st.booleans(), max_size=30))
def test_longest_run(flags):
    text = "".join("x" if flag else " " for flag in flags)
    assert longest_run(np.array(flags, dtype=bool)) == max(map(len, text.split(" ")), default=0)


def rows_of(found):
    return [
        row | {"split": split}
        for split, rows in datasets.load_dataset(str(found.root)).items()
        for row in rows.to_list()
    ]


def content(row):
    return tuple(row["input_ids"])


def test_what_is_dropped_is_gone_counted_and_listed(config, forked):
    """Completions of one token with top-k 2 are often equal; workers drop the same duplicates."""
    settings = {"num_samples": 8, "max_new_tokens": 1, "top_k": 2, "rows_per_shard": 3}
    everything = run(config("all", **settings))
    rows = rows_of(everything)
    assert len(rows) == everything.counts.kept == everything.counts.completions == 8 * 18
    first = {}
    for row in rows:
        first.setdefault(content(row), row)
    assert len(first) < len(rows)
    found = run(config("distinct", drop=("duplicate",), **settings))
    kept = rows_of(found)
    assert [(row["split"], row["source_row"], row["sample"]) for row in kept] == [
        (row["split"], row["source_row"], row["sample"]) for row in first.values()
    ]
    assert found.counts.duplicate == len(rows) - len(kept) == everything.counts.duplicate
    assert found.counts.kept == len(kept)
    lines = (found.root / "reports" / "dropped.tsv").read_text().splitlines()
    assert len(lines) == found.counts.duplicate
    assert {line.split("\t")[3] for line in lines} == {"duplicate"}
    card = (found.root / "README.md").read_text()
    assert f"| duplicate: the same as one before | {found.counts.duplicate} |" in card
    assert "Dropped: duplicate; which they were stands in `reports/dropped.tsv`." in card
    others = run(config("workers", drop=("duplicate",), num_workers=2, **settings))
    assert others.end == found.end
    assert hashes(others) == hashes(found)


def test_cut_completions_are_dropped_where_that_is_asked_for(config):
    found = run(config(drop=("cut",), num_samples=4))
    assert {row["finish_reason"] for row in rows_of(found)} == {"eos"}
    assert found.counts.kept == found.counts.ended < found.counts.completions


def test_empty_completions_are_counted(config):
    """With every printable ASCII character as a stop string, many completions are empty."""
    settings = {"max_new_tokens": 3, "stop": tuple(map(chr, range(32, 127)))}
    found = run(config("counted", **settings))
    assert found.counts.empty > 0
    rows = rows_of(found)
    assert found.counts.empty == sum(not row["completion"].strip() for row in rows)
    dropped = run(config("dropped", drop=("empty",), **settings))
    assert dropped.counts.kept == len(rows) - found.counts.empty


def test_no_completion_left_is_a_line(config):
    with pytest.raises(CacheError, match=r"no completion is left: 0 of 16 completions kept: .* another --drop"):
        run(config(drop=("cut",), max_new_tokens=1, rows="0:4", stop=(), model=config().model, temperature=0.01))


def test_an_equal_completion_that_is_dropped_itself_makes_no_duplicate():
    """A complete example is kept if only a dropped, cut example has the same text.

    A second complete example with that text is dropped.
    """

    def row(finish_reason):
        return {"completion": "so it ends", "input_ids": [1, 2], "labels": [-100, 2], "finish_reason": finish_reason}

    tally = _Tally(labelled=True)
    assert [tally.drops(row(reason), ("cut", "duplicate")) for reason in ("length", "eos", "length", "eos")] == [
        ["cut"],
        [],
        ["cut", "duplicate"],
        ["duplicate"],
    ]
    assert (tally.counted["duplicate"], tally.counted["cut"]) == (3, 2)
