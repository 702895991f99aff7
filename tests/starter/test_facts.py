"""Statistics of each column."""

from __future__ import annotations

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.files.parquet import parquet_rows
from pipeline.starter.facts import column_facts, sampled_ranges


def test_facts_of_columns_over_all_splits():
    one = datasets.Dataset.from_dict(
        {"t": ["a b c", " ", None, "a b c"], "n": [1.0, float("nan"), 2.5, 1.0], "u": ["www.a.b/c"] * 4, "m": [[1]] * 4}
    )
    two = datasets.Dataset.from_dict({"t": ["d"], "n": [3.0], "u": ["http://x"], "c": [0]})
    two = two.cast_column("c", datasets.ClassLabel(names=["no", "yes"]))
    found = column_facts({"train": one, "test": two})
    assert list(found) == ["t", "n", "u", "m", "c"]
    text = found["t"]
    assert (text.rows, text.filled, text.distinct, text.values) == (5, 3, 2, (("a b c", 2), ("d", 1)))
    assert text.mean_words == 7 / 3
    assert found["n"].fractions
    assert (found["n"].filled, found["n"].distinct) == (4, 3)
    assert found["u"].looks == "url"
    assert found["c"].class_names == ("no", "yes")
    assert found["m"].kind == "lists of integers"
    assert not found["m"].is_scalar


def test_many_rows_are_sampled_evenly(tmp_path):
    rows = datasets.Dataset.from_dict({"n": list(range(1000))})
    parts = sampled_ranges(rows, 100, runs=10)
    assert [part.start for part in parts] == list(range(0, 1000, 100))
    assert sum(map(len, parts)) == 100
    assert sampled_ranges(rows, 1000) == [range(1000)]
    pq.write_table(pa.table({"n": list(range(1000))}), tmp_path / "d.parquet", row_group_size=50)
    parts = sampled_ranges(parquet_rows([str(tmp_path / "d.parquet")]), 100, runs=5)
    assert len(parts) == 5
    assert sum(map(len, parts)) == 100
    assert (parts[0].start, parts[-1].start) == (0, 950)
