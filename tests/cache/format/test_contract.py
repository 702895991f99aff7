"""A capture whose contract differs in any single field is refused as another capture.

The cases are generated from the dataclass fields, so that new fields are covered.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache import Plan
from pipeline.cache.format.manifest import Layout, cache_id, check_same_contract, dump, make_manifest, parse
from pipeline.cache.writing.build import begin
from pipeline.errors import ContractError, PipelineError
from pipeline.records import (
    Columns,
    Contract,
    Encoding,
    Full,
    JudgeInfo,
    Masking,
    ModelInfo,
    Sampled,
    ServerInfo,
    Shard,
    ShardPlan,
    SourceInfo,
    Tokenization,
    TokenizerInfo,
    TopK,
    TopP,
    UnlabelledSource,
    Views,
)
from tests.support.rows import build_cache, make_plan


def contract(encoding: Encoding) -> Contract:
    """A contract with common values; fields that depend on the task keep their empty defaults."""
    return Contract(
        task="sequence-classification",
        encoding=encoding,
        num_classes=3,
        label_names=("a", "b", "c"),
        teacher=ModelInfo("t", None, "T", "0" * 64, 10, "float32", None),
        tokenizer=TokenizerInfo("1" * 64, None, 50, {"pad": 0, "eos": 1}),
        source=SourceInfo("s", None, None, Columns(), {"train": "2" * 64}),
        tokenization=Tokenization(64),
        store_text=True,
        batch_tokens=100,
        seed=0,
        versions={"torch": "2"},
        columns={"source_row": "int64"},
    )


def other(value: Any) -> Any:
    """A different value of the same type; a string for None."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, tuple):
        return (*value[:-1], other(value[-1])) if value else ("x",)
    return "x"  # value is None


def mutations(record: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path of each leaf field and a copy of the record with only that leaf changed."""
    for field in dataclasses.fields(record):
        value, path = getattr(record, field.name), f"{where}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from ((p, dataclasses.replace(record, **{field.name: v})) for p, v in mutations(value, f"{path}."))
        elif isinstance(value, Mapping):
            for key in value:
                yield f"{path}.{key}", dataclasses.replace(record, **{field.name: {**value, key: other(value[key])}})
            more = next(iter(value.values()))
            yield f"{path}.more", dataclasses.replace(record, **{field.name: {**value, "more": more}})
        elif field.name != "kind":  # a constant of the class
            changed = OTHERS[field.name] if field.name in OTHERS else other(value)
            yield path, dataclasses.replace(record, **{field.name: changed})


#: Different values for fields that are empty here, so that `other` cannot infer their type.
OTHERS: dict[str, Any] = {
    "rows": (0, 7),
    "unlabelled_sources": (UnlabelledSource("u.csv", None, 5),),
    "judge": JudgeInfo(("{{ text }}",), "plain", ("good", "bad"), ("train:3",), 7),
    "masking": Masking(),
    "views": Views(2),
    "choices": ("one", "two"),
    "num_choices": 4,
    "stride": 7,
    "server": ServerInfo("vllm", "1", 20, 1e-5, {"dtype": "float16"}),
}


def judged(plain: Contract) -> Contract:
    """The contract of a capture from a served language-model judge."""
    teacher = dataclasses.replace(plain.teacher, judge=OTHERS["judge"], server=OTHERS["server"])
    return dataclasses.replace(plain, teacher=teacher)


def masked(plain: Contract) -> Contract:
    """The contract of a capture from a masked language model."""
    return dataclasses.replace(plain, tokenization=dataclasses.replace(plain.tokenization, masking=Masking(copies=2)))


CASES = [
    pytest.param(base, changed, path, id=f"{name}-{path}")
    for name, base in (
        *((encoding.kind, contract(encoding)) for encoding in (Full(), TopK(2), TopP(0.5), Sampled(6.0))),
        ("judged", judged(contract(Full()))),
        ("masked", masked(contract(Full()))),
    )
    for path, changed in mutations(base)
]


def test_all_that_is_told_apart_is_among_them():
    paths = {case.values[2] for case in CASES}
    assert len(CASES) > 120
    for path in ("task", "teacher.revision", "teacher.dtype", "tokenizer.sha256", "tokenizer.special_ids.eos"):
        assert path in paths
    for path in ("tokenizer.chat_template_sha256", "num_classes", "tokenization.max_length", "encoding.temperature"):
        assert path in paths
    for path in ("encoding.sample_size", "encoding.k", "encoding.p", "encoding.temperatures", "label_names"):
        assert path in paths


@pytest.mark.parametrize(("base", "changed", "path"), CASES)
def test_a_capture_with_one_other_setting_is_refused_and_the_setting_named(base, changed, path):
    shards = (ShardPlan("train-00000", "train", 0, 3),)
    with pytest.raises(ContractError, match=re.escape(f"holds another capture: contract.{path}")):
        check_same_contract(Plan(changed, shards), Plan(base, shards), Layout(Path("there")))
    again = contract(base.encoding)
    again = again if base.teacher.judge is None else judged(again)
    again = again if base.tokenization.masking is None else masked(again)
    check_same_contract(Plan(base, shards), Plan(again, shards), Layout(Path("there")))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ShardPlan)])
def test_shards_cut_otherwise_are_refused(field):
    shard = ShardPlan("train-00000", "train", 0, 3)
    changed = dataclasses.replace(shard, **{field: other(getattr(shard, field))})
    with pytest.raises(ContractError, match="holds another capture: shards"):
        check_same_contract(Plan(contract(Full()), (changed,)), Plan(contract(Full()), (shard,)), Layout(Path("there")))


def test_no_mutation_of_a_real_plan_begins_or_touches_a_file(tmp_path, lm_tokenizer):
    cache = build_cache(tmp_path / "cache", lm_tokenizer)
    shards = tuple(ShardPlan(f"train-{i:05d}", "train", i * 30, (i + 1) * 30) for i in range(2))
    plan, _ = make_plan(lm_tokenizer, Sampled(6.0), 41, shards, tokens=True)
    before = {path: path.stat().st_mtime_ns for path in cache.root.rglob("*") if path.is_file()}
    for path, changed in mutations(plan.contract):
        with pytest.raises(PipelineError) as refused:
            begin(cache.root, dataclasses.replace(plan, contract=changed), lm_tokenizer)
        assert "\n" not in str(refused.value), path
    assert {path: path.stat().st_mtime_ns for path in cache.root.rglob("*") if path.is_file()} == before


def test_a_label_map_is_left_out_of_the_manifest_where_there_is_none(tmp_path):
    base = contract(Full())
    plain, path = Plan(base, ()), tmp_path / "plan.json"
    assert "label_map" not in dump(plain)
    assert cache_id(base, ()) == "a670d21d1d309bc13fab3c059e859f9ee706cc2932461a790d79c3be6c4bf973"
    mapped = dataclasses.replace(base, source=dataclasses.replace(base.source, label_map=("3=sport",)))
    assert cache_id(mapped, ()) != cache_id(base, ())
    for plan in (plain, Plan(mapped, ())):
        path.write_text(dump(plan))
        assert parse(Plan, path) == plan
    with pytest.raises(ContractError, match=r'label_map: expected null, found \["3=sport"\]'):
        check_same_contract(Plan(mapped, ()), plain, Layout(Path("there")))


def test_a_manifest_grows_by_a_line_for_each_shard_and_a_number_for_each_row_group():
    """The manifest of 10^9 rows in 10,000 shards of 100 row groups is smaller than 20 MB."""

    def size(shards: int, groups: int) -> int:
        names = [f"train-{i:05d}" for i in range(10_000, 10_000 + shards)]
        table = tuple(
            Shard(name, "train", 10**5, 10**8, 10**8, 10**9, "f" * 64, (1000,) * groups, "f" * 64) for name in names
        )
        return len(dump(make_manifest(contract(Full()), table, bad_rows=0, probe=None)))

    base = size(1, 100)
    assert (size(101, 100) - base) / 100 < 2000
    assert (size(1, 1100) - base) / 1000 < 15


@pytest.mark.parametrize("there", [(), ("receipts/train-00000.json",), ("manifest.json",)])
def test_a_refusal_says_if_no_shard_would_be_lost(tmp_path, there):
    layout = Layout(tmp_path)
    layout.plan.parent.mkdir()
    for name in (str(layout.plan), *there):
        (tmp_path / name).write_text("{}")
    base = contract(Full())
    with pytest.raises(ContractError, match="or --overwrite to start over") as refused:
        check_same_contract(Plan(dataclasses.replace(base, seed=1), ()), Plan(base, ()), layout)
    assert str(refused.value).endswith(" (no shard of it is finished)") == (not there)
