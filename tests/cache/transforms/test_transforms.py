"""Merging, filtering and converting caches.

Each result passes verification, holds the right rows and lists its ancestors; invalid requests are
refused.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner

from pipeline.cache import Cache, verify
from pipeline.cache.format.manifest import Layout
from pipeline.cache.format.schema import cache_schema
from pipeline.cache.transforms import convert, filter_rows, merge, rewrite
from pipeline.cache.transforms.condition import Condition
from pipeline.cache.transforms.convert import _uniforms
from pipeline.cache.views.card import license_beside
from pipeline.cache.views.reports import write_reports
from pipeline.cache.writing.build import begin, finish, record
from pipeline.cache.writing.writer import write_shard
from pipeline.cli import main
from pipeline.errors import CacheError, ContractError, EncodingError, IntegrityError, MisuseError
from pipeline.records import Full, ModelInfo, Receipt, Sampled, ShardPlan, SourceInfo, TopK
from pipeline.softlabels import counter_uniforms, target
from tests.support.rows import block_from, build_cache, make_plan, token_row


def make_cache(root, tokenizer, numbers, *, split="train", encoding=None, **changes):
    """A cache of the numbered token rows in shards of 20; `changes` replace contract fields."""
    encoding = encoding or TopK(4)
    numbers = list(numbers)
    parts = [numbers[i : i + 20] for i in range(0, len(numbers), 20)]
    shards = tuple(ShardPlan(f"{split}-{i:05d}", split, 20 * i, 20 * i + len(part)) for i, part in enumerate(parts))
    plan, schema = make_plan(tokenizer, encoding, 41, shards, tokens=True, kept={"id": pa.string()})
    plan = dataclasses.replace(plan, contract=dataclasses.replace(plan.contract, **changes))
    layout = begin(root, plan, tokenizer)
    for shard, part in zip(shards, parts, strict=True):
        made = write_shard(
            layout.shard(shard.name), shard, [token_row(n, encoding, 41, known=True) for n in part], schema
        )
        record(layout, Receipt(made, shard, ((1, 1),), "cpu", 0.0, 0.0))
    return finish(layout, plan)


def ids_of(cache, split="train"):
    return [row.example.kept["id"] for row in cache.dataset(split)]


def named(*numbers):
    return [f"row-{n}" for n in numbers]


# -------------------------------------------------------------------------------------------- merge


def test_merge_joins_shards_and_keeps_equal_content_once(tmp_path, lm_tokenizer, caplog):
    first = make_cache(tmp_path / "a", lm_tokenizer, range(40))
    source = SourceInfo("other", None, "abc", first.manifest.contract.source.columns, {"train": "1" * 64})
    second = make_cache(tmp_path / "b", lm_tokenizer, range(30, 70), source=source, versions={"torch": "1"}, seed=7)
    test = make_cache(tmp_path / "t", lm_tokenizer, range(100, 110), split="test")
    merged = merge([first, second, test], tmp_path / "m")
    assert verify(merged.root).problems == ()
    assert ids_of(merged) == named(*range(70))
    assert ids_of(merged, "test") == named(*range(100, 110))
    contract = merged.manifest.contract
    assert contract.source.name == "in-memory + other"
    assert contract.source.fingerprints["train"] not in ("0" * 64, "1" * 64)
    assert contract.versions == {"torch": "0, 1"}
    assert [(a.cache_id, a.operation) for a in merged.manifest.ancestry] == [
        (cache.manifest.cache_id, "merge") for cache in (first, second, test)
    ]
    shards = {shard.name: shard for shard in merged.manifest.shards}
    assert list(shards) == ["train-00000", "train-00001", "train-00002", "train-00003", "test-00000"]
    assert shards["train-00003"].sha256 == second.manifest.shards[1].sha256  # copied as bytes
    assert [shard.rows for shard in shards.values()] == [20, 20, 10, 20, 10]
    assert (merged.root / "README.md").is_file()
    table = duckdb.sql(f"select count(distinct content_hash), count(*) from '{merged.root}/data/train-*.parquet'")
    assert table.fetchall() == [(70, 70)]


def test_merging_a_cache_with_itself_changes_nothing_but_its_name(tmp_path, lm_tokenizer):
    cache = make_cache(tmp_path / "a", lm_tokenizer, range(40))
    merged = merge([cache, cache], tmp_path / "m")
    assert ids_of(merged) == named(*range(40))
    assert merged.manifest.shards == cache.manifest.shards  # empty shards have no file
    assert merged.manifest.cache_id == cache.manifest.cache_id
    assert sorted(p.name for p in (merged.root / "data").iterdir()) == ["train-00000.parquet", "train-00001.parquet"]


def test_a_row_in_two_splits_is_warned_of(tmp_path, lm_tokenizer, caplog):
    train = make_cache(tmp_path / "a", lm_tokenizer, range(20))
    test = make_cache(tmp_path / "b", lm_tokenizer, range(15, 25), split="test")
    merged = merge([train, test], tmp_path / "m")
    assert "test: 5 rows are in another split too" in caplog.text
    assert len(ids_of(merged, "test")) == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoding": TopK(3)}, "encoding.k: expected 4, found 3"),
        ({"teacher": ModelInfo("else", None, "T", "0" * 64, 1, "float32", None)}, 'teacher.name: expected "tiny"'),
        ({"store_text": True}, "store_text"),
    ],
)
def test_another_contract_is_refused_with_the_first_difference(tmp_path, lm_tokenizer, change, message):
    first = make_cache(tmp_path / "a", lm_tokenizer, range(20))
    second = make_cache(tmp_path / "b", lm_tokenizer, range(20), **change)
    with pytest.raises(ContractError, match=message) as found:
        merge([first, second], tmp_path / "m")
    assert "may differ in source, versions, seed" in str(found.value)
    assert not (tmp_path / "m").exists()


def test_a_stopped_merge_goes_on_and_refuses_other_inputs(tmp_path, lm_tokenizer, monkeypatch):
    first = make_cache(tmp_path / "a", lm_tokenizer, range(40))
    second = make_cache(tmp_path / "b", lm_tokenizer, range(30, 70))
    plain, made = rewrite.record, []

    def stop_after_two(layout, receipt):
        plain(layout, receipt)
        made.append(receipt.plan.name)
        if len(made) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(rewrite, "record", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        merge([first, second], tmp_path / "m")
    assert not (tmp_path / "m" / "manifest.json").exists()
    monkeypatch.setattr(
        rewrite, "record", lambda layout, receipt: (plain(layout, receipt), made.append(receipt.plan.name))
    )
    with pytest.raises(ContractError, match="holds another capture"):
        merge([second, first], tmp_path / "m")
    merged = merge([first, second], tmp_path / "m")
    assert made == ["train-00000", "train-00001", "train-00002", "train-00003"]
    assert ids_of(merged) == named(*range(70))
    assert merge([first, second], tmp_path / "m").manifest == merged.manifest  # already finished


def test_a_damaged_input_is_named(tmp_path, lm_tokenizer):
    first = make_cache(tmp_path / "a", lm_tokenizer, range(20))
    second = make_cache(tmp_path / "b", lm_tokenizer, range(20, 40))
    path = Layout(second.root).shard("train-00000")
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=str(path)):
        merge([first, second], tmp_path / "m")
    assert not (tmp_path / "m" / "manifest.json").exists()


# ------------------------------------------------------------------------------------------- filter


def test_filter_keeps_what_duckdb_would(tmp_path, lm_tokenizer):
    cache = make_cache(tmp_path / "a", lm_tokenizer, range(60))
    where = "len(input_ids) > 5 and id like '%7' or list_sum(top_logprobs) < -40"
    made = filter_rows(cache, tmp_path / "f", where=where)
    assert verify(made.root).problems == ()
    expected = duckdb.sql(f"select id from '{cache.root}/data/*.parquet' where {where} order by source_row").fetchall()
    assert ids_of(made) == [row[0] for row in expected]
    assert 0 < len(expected) < 60
    assert made.manifest.ancestry[0].operation == f"filter where {where}"
    ours = {row.example.kept["id"]: row for row in cache.dataset("train")}
    for row in made.dataset("train"):
        assert torch.equal(row.soft.top_logprobs, ours[row.example.kept["id"]].soft.top_logprobs)


def test_a_cache_is_sampled_split_and_put_together_again(tmp_path, lm_tokenizer):
    """The recipe for a validation split in docs/caches.md."""
    cache = make_cache(tmp_path / "a", lm_tokenizer, range(60))
    held = filter_rows(
        cache, tmp_path / "v", where="hash(content_hash) % 4 = 0", splits=["train"], as_split="validation"
    )
    rest = filter_rows(cache, tmp_path / "r", where="hash(content_hash) % 4 <> 0", splits=["train"])
    both = merge([rest, held], tmp_path / "both")
    assert both.splits == ("train", "validation")
    assert 5 <= len(ids_of(both, "validation")) <= 25
    assert sorted([*ids_of(both), *ids_of(both, "validation")]) == sorted(named(*range(60)))
    assert [a.operation.split()[0] for a in both.manifest.ancestry] == ["filter", "filter", "merge", "merge"]


def test_a_licence_goes_on_where_all_agree(tmp_path, lm_tokenizer):
    caches = [
        make_cache(tmp_path / name, lm_tokenizer, rows) for name, rows in (("a", range(20)), ("b", range(20, 40)))
    ]
    write_reports(caches[0], caches[0].root, license="apache-2.0")
    assert license_beside(filter_rows(caches[0], tmp_path / "f", where="true").root / "README.md") == "apache-2.0"
    assert license_beside(merge(caches, tmp_path / "m").root / "README.md") is None
    write_reports(caches[1], caches[1].root, license="apache-2.0")
    assert license_beside(merge(caches, tmp_path / "n").root / "README.md") == "apache-2.0"


def test_a_condition_true_of_all_copies_the_bytes(tmp_path, lm_tokenizer):
    cache = make_cache(tmp_path / "a", lm_tokenizer, range(40))
    made = filter_rows(cache, tmp_path / "f", where="true")
    assert made.manifest.cache_id == cache.manifest.cache_id
    assert made.manifest.ancestry[0].cache_id == cache.manifest.cache_id


def test_small_row_groups_are_put_together(tmp_path, lm_tokenizer, monkeypatch):
    monkeypatch.setattr("pipeline.cache.writing.writer._MAX_ROWS", 5)
    cache = make_cache(tmp_path / "a", lm_tokenizer, range(20))
    assert cache.manifest.shards[0].row_groups == (5, 5, 5, 5)
    made = filter_rows(cache, tmp_path / "f", where="source_row % 2 = 0 or source_row > 15")
    assert made.manifest.shards[0].row_groups == (5, 3, 4)  # from 3, 2, 3 and 4
    assert verify(made.root).problems == ()


@pytest.mark.parametrize(
    "where",
    [
        "nothing > 1",
        "source_row >",
        "sum(source_row) > 1",
        "source_row > (select avg(source_row) from cache)",
        "exists (select 1 from read_csv('/etc/passwd'))",
        "true); copy (select 1) to '{tmp}/stolen.csv'; select (1",
        "true) union all (select 1",
        "true) order by (1",
        "source_row in (from '{tmp}/other.parquet')",
        "text_bytes[",
    ],
)
def test_a_condition_is_data_and_reaches_nothing_else(tmp_path, lm_tokenizer, where):
    cache = make_cache(tmp_path / "a", lm_tokenizer, range(5))
    with pytest.raises(MisuseError, match="--where"):
        filter_rows(cache, tmp_path / "f", where=where.replace("{tmp}", str(tmp_path)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_the_recipes_of_the_docs_are_conditions():
    """Each condition of the table in docs/caches.md is valid for the columns of a cache."""
    page = (Path(__file__).parents[3] / "docs" / "caches.md").read_text()
    table = page[page.index("| to keep | `--where` |") : page.index("A validation split from the training rows")]
    recipes = re.findall(r"^\|[^|]+\| `(.+)` \|$", table, re.MULTILINE)[1:]
    assert len(recipes) == 6
    schema = cache_schema(
        TopK(4), 41, labels="tokens", marks_positions=True, kept={"domain": pa.string(), "label": pa.int32()}
    )
    for recipe in recipes:
        assert Condition(recipe, schema).keep(schema.empty_table()).tolist() == []


def test_nothing_is_left_where_no_row_is(tmp_path, lm_tokenizer):
    cache = make_cache(tmp_path / "a", lm_tokenizer, range(5))
    with pytest.raises(CacheError, match="is true for no row"):
        filter_rows(cache, tmp_path / "f", where="source_row < 0")
    assert not (tmp_path / "f").exists()
    with pytest.raises(CacheError, match="no split 'dev'; the cache has train"):
        filter_rows(cache, tmp_path / "f", splits=["dev"])
    with pytest.raises(MisuseError, match="is the cache that is read"):
        filter_rows(cache, tmp_path / "a", where="true")
    assert len(ids_of(Cache.open(tmp_path / "a"))) == 5


# ------------------------------------------------------------------------------------------ convert


@pytest.mark.parametrize("wanted", [TopK(4), Sampled(6.0)], ids=lambda e: e.kind)
@pytest.mark.parametrize("tokens", [True, False])
def test_full_converts_to_what_was_encoded_from_the_logits(tmp_path, lm_tokenizer, wanted, tokens):
    full = build_cache(tmp_path / "full", lm_tokenizer, encoding=Full(), tokens=tokens)
    made = convert(full, tmp_path / "c", encoding=wanted)
    assert verify(made.root).problems == ()
    assert made.manifest.contract.encoding == wanted
    assert (
        made.manifest.ancestry[0].operation == f"convert full to {'top-k 4' if wanted.kind == 'top-k' else 'sampled 6'}"
    )
    direct = build_cache(tmp_path / "d", lm_tokenizer, encoding=wanted, tokens=tokens)
    assert list(made.manifest.contract.columns) == list(direct.manifest.contract.columns)
    for row, expected, before in zip(
        made.dataset("train"), direct.dataset("train"), full.dataset("train"), strict=True
    ):
        assert row.example.source_row == before.example.source_row
        assert row.teacher_entropy_sum == before.teacher_entropy_sum
        assert row.content_hash == before.content_hash
        assert torch.equal(
            row.soft.top_ids[row.soft.top_offsets[:-1]], expected.soft.top_ids[expected.soft.top_offsets[:-1]]
        )
        if wanted.kind == "top-k":
            assert torch.equal(row.soft.top_ids, expected.soft.top_ids)
            torch.testing.assert_close(row.soft.log_residuals, expected.soft.log_residuals, atol=2e-3, rtol=2e-3)


def test_the_entropy_of_a_softened_sample_is_its_own(tmp_path, lm_tokenizer):
    full = build_cache(tmp_path / "full", lm_tokenizer, encoding=Full())
    made = convert(full, tmp_path / "c", encoding=Sampled(6.0, 2.0))
    row, before = made.dataset("train")[4], full.dataset("train")[4]
    goal = target(before.soft, 2.0)
    assert row.teacher_entropy_sum == pytest.approx(-float(goal.negative_entropy.sum()), rel=1e-4)
    assert row.teacher_nll_sum == before.teacher_nll_sum


def test_a_sample_is_sampled_anew_and_verifies(tmp_path, lm_tokenizer):
    first = build_cache(tmp_path / "a", lm_tokenizer, encoding=Sampled(12.0))
    second = convert(first, tmp_path / "b", encoding=Sampled(5.0))
    third = convert(second, tmp_path / "c", encoding=Sampled(3.0))
    assert verify(second.root).problems == ()
    assert verify(third.root).problems == ()
    assert third.manifest.shards[0].bytes < first.manifest.shards[0].bytes
    sums = [float(target(row.soft, 1.0).weights.sum()) / len(row.soft) for row in third.dataset("train")]
    assert np.mean(sums) == pytest.approx(1.0, abs=0.05)
    with pytest.raises(EncodingError, match="random sample"):
        convert(first, tmp_path / "x", encoding=TopK(2))
    assert not (tmp_path / "x").exists()


def test_a_sample_is_sampled_anew_with_numbers_of_its_own():
    """Sampling from a sampled encoding draws new uniforms for each sample size.

    Reusing the uniforms of the first draw would bias the sample (tests/softlabels/test_convert.py).
    From full logits, the capture's own uniforms are used, so that the result equals a capture.
    """
    row = token_row(3, Sampled(12.0), 41)
    positions = np.flatnonzero(row.example.supervised)
    drawn = counter_uniforms(0, "train", 3, 0, positions)
    again = [_uniforms(block_from(row), Sampled(size), "train", 0) for size in (6.0, 3.0)]
    assert not torch.isclose(again[0], drawn).any()
    assert not torch.isclose(again[0], again[1]).any()
    assert torch.equal(_uniforms(block_from(token_row(3, Full(), 41)), Sampled(6.0), "train", 0), drawn)


# ----------------------------------------------------------------------------------------- commands


def test_the_commands(tmp_path, lm_tokenizer):
    make_cache(tmp_path / "a", lm_tokenizer, range(40))
    make_cache(tmp_path / "b", lm_tokenizer, range(30, 60))

    def call(*arguments):
        return CliRunner().invoke(main, [str(a).replace("~", str(tmp_path)) for a in arguments], catch_exceptions=False)

    done = call("merge", "--cache", "~/a", "--cache", "~/b", "--output", "~/m")
    assert "train: 60 rows" in done.stdout
    done = call("filter", "--cache", "~/m", "--where", "source_row % 2 = 0", "--output", "~/f")
    assert "train: 30 rows" in done.stdout
    done = call("convert", "--cache", "~/f", "--encoding", "top-k", "--top-k", "2", "--output", "~/c")
    assert "train: 30 rows" in done.stdout
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert [a["operation"].split()[0] for a in manifest["ancestry"]] == ["merge", "merge", "filter", "convert"]
    assert manifest["contract"]["encoding"] == {"k": 2, "temperatures": [1.0, 2.0, 4.0], "kind": "top-k"}
    assert call("merge", "--cache", "~/a", "--output", "~/x").exit_code == 2
    assert call("filter", "--cache", "~/a", "--output", "~/x").exit_code == 2
    refused = call("convert", "--cache", "~/f", "--encoding", "sampled", "--output", "~/x")
    assert refused.exit_code == 1
    assert "not known one by one" in refused.stderr
    assert call("convert", "--cache", "~/f", "--encoding", "top-k", "--top-p", "0.5", "--output", "~/x").exit_code == 2
