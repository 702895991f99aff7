"""Batches built from columns equal batches built from stored rows one by one."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import skip_first_batches
from torch.utils.data import DataLoader

from pipeline.cache import Cache
from pipeline.cache.format.rows import gather, rows_of
from pipeline.cache.format.schema import cache_schema, describe
from pipeline.cache.writing.build import begin, finish, record
from pipeline.cache.writing.writer import write_shard
from pipeline.records import Full, Receipt, Sampled, ShardPlan, Tokenization, TopK, TopP
from pipeline.softlabels import target
from pipeline.tasks import get_task
from pipeline.training.batches.collate import Collator, TrainingRows
from pipeline.training.batches.mixing import JoinedDataset
from pipeline.training.batches.order import OPEN, BatchOrder
from tests.support.rows import build_cache, class_row, make_plan, token_row

ENCODINGS = [Full(), TopK(4), TopP(0.7), Sampled(6.0)]
LM, CLASSES = get_task("causal-lm"), get_task("sequence-classification")
FILL = 7


def loader(dataset, collator, **settings):
    order = BatchOrder(dataset, 8, seed=3, **settings)
    return DataLoader(TrainingRows(dataset), batch_sampler=order, collate_fn=collator)


def stored(cache: Cache) -> list[dict]:
    """Return every row of `train` as Python lists and numbers from Parquet."""
    shards = cache.manifest.split_shards("train")
    return [row for s in shards for row in pq.read_table(cache.root / "data" / f"{s.name}.parquet").to_pylist()]


# ----------------------------------------------------------------------------- row-by-row reference


def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*map(int, row), *[fill] * (width - len(row))] for row in rows])


def expected(cache: Cache, rows: list[dict], weights: list[float], temperature: float) -> dict:
    """Build the parts of a batch one row and one position at a time."""
    tokens = [row["input_ids"] for row in rows]
    inputs = {"input_ids": padded(tokens, FILL)}
    if "document_lengths" in rows[0]:
        width = inputs["input_ids"].shape[1]
        parts = [[*row["document_lengths"], width - len(row["input_ids"])] for row in rows]
        inputs["position_ids"] = torch.tensor([[i for part in each for i in range(part)] for each in parts])
    else:
        inputs["attention_mask"] = padded([[1] * len(row) for row in tokens], 0)
    if "token_type_ids" in rows[0]:
        inputs["token_type_ids"] = padded([row["token_type_ids"] for row in rows], 0)
    labels, each, goals, entropies = [], [], [], []
    for row, weight in zip(rows, weights, strict=True):
        soft = cache.soft_labels(row)
        truth = [-100 if row.get("label") is None else row["label"]]
        if "supervised" in row:
            truth = [row["input_ids"][t + 1] for t, flag in enumerate(row["supervised"]) if flag]
        assert len(truth) == len(soft)
        labels += truth if weight else [-100] * len(truth)
        each += [weight] * len(truth)
        entropy = torch.tensor(row.get("entropy") or [row["teacher_entropy_sum"] / len(truth)] * len(truth))
        goal = target(soft, temperature, entropy=entropy)
        goals.append(goal)
        entropies += (-goal.negative_entropy if isinstance(soft.encoding, Full) else entropy).tolist()
    return {
        "inputs": inputs,
        "labels": torch.tensor(labels),
        "weights": torch.tensor(each),
        "shares": (torch.tensor(entropies) / math.log(goals[0].num_classes)).clamp(0, 1),
        "source_rows": torch.tensor([row["source_row"] for row in rows]),
        "counts": torch.cat([goal.offsets.diff() for goal in goals]),
        "ids": torch.cat([goal.ids for goal in goals]),
        "target_weights": torch.cat([goal.weights for goal in goals]),
        "negative_entropy": torch.cat([goal.negative_entropy for goal in goals]),
        "log_residual": None if goals[0].log_residual is None else torch.cat([goal.log_residual for goal in goals]),
    }


def assert_batch(found: dict, wanted: dict, *, uncertainty: bool = False) -> None:
    assert list(found["inputs"]) == list(wanted["inputs"])
    for name, tensor in wanted["inputs"].items():
        assert torch.equal(found["inputs"][name], tensor), name
    for name in ("labels", "weights", "source_rows"):
        assert torch.equal(found[name], wanted[name]), name
    goal = found["target"]
    assert torch.equal(goal["offsets"].diff(), wanted["counts"])
    assert torch.equal(goal["ids"], wanted["ids"])
    close = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(goal["weights"], wanted["target_weights"], **close)
    torch.testing.assert_close(goal["negative_entropy"], wanted["negative_entropy"], **close)
    assert ("log_residual" in goal) == (wanted["log_residual"] is not None)
    if wanted["log_residual"] is not None:
        torch.testing.assert_close(goal["log_residual"], wanted["log_residual"], **close)
    share = wanted["shares"] if uncertainty else torch.ones_like(wanted["shares"])
    torch.testing.assert_close(found["soft_weights"], wanted["weights"] * share, rtol=1e-5, atol=1e-6)


def check(cache: Cache, task, temperature: float = 1.0, *, uncertainty: bool = False, **settings) -> None:
    """Compare every batch of an epoch, and of an epoch resumed in its middle."""
    rows, dataset = stored(cache), cache.dataset("train", window=OPEN)
    if "batch_tokens" in settings:
        settings["lengths"] = dataset.num_tokens()
    weighing = "uncertainty" if uncertainty else "equal"
    collator = Collator(task, cache.tokenizer, temperature, pad_id=FILL, position_weights=weighing)
    found = loader(dataset, collator, **settings)
    numbers = list(found.batch_sampler)
    batches = list(found)
    assert len(batches) == len(numbers) > 2
    for batch, picked in zip(batches, numbers, strict=True):
        weights = [float(i >= 0) for i in picked]
        wanted = expected(cache, [rows[max(i, ~i)] for i in picked], weights, temperature)
        assert_batch(batch, wanted, uncertainty=uncertainty)
    if settings.get("rank"):
        return
    for batch, whole in zip(skip_first_batches(found, 2), batches[2:], strict=True):
        assert torch.equal(batch["source_rows"], whole["source_rows"])
        assert torch.equal(batch["target"]["weights"], whole["target"]["weights"])


# ------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.kind)
def test_language_models(tmp_path, lm_tokenizer, encoding):
    cache = build_cache(tmp_path / "c", lm_tokenizer, encoding=encoding, classes=320, per_shard=7, shards=7)
    check(cache, LM, batch_tokens=40)
    for rank in (0, 2):  # the last step has one row, and the third rank repeats it as a filler
        check(cache, LM, rank=rank, world_size=3)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.kind)
def test_classifiers(tmp_path, lm_tokenizer, encoding):
    cache = build_cache(tmp_path / "c", lm_tokenizer, encoding=encoding, classes=5, tokens=False, per_shard=7, shards=4)
    check(cache, CLASSES, 1.0 if isinstance(encoding, Sampled) else 1.7)
    check(cache, CLASSES, uncertainty=True, keep=np.arange(28) % 3 != 2)


def build_wide(root, tokenizer, encoding, rows, **columns) -> Cache:
    """Write a cache of two shards with columns that `build_cache` does not write."""
    classes, tokens = rows[0].soft.num_classes, rows[0].example.supervised is not None
    schema = cache_schema(encoding, classes, labels="tokens" if tokens else "row", marks_positions=tokens, **columns)
    half = len(rows) // 2
    shards = (ShardPlan("train-00000", "train", 0, half), ShardPlan("train-00001", "train", half, 2 * half))
    plan, _ = make_plan(tokenizer, encoding, classes, shards, tokens=tokens)
    plan = dataclasses.replace(plan, contract=dataclasses.replace(plan.contract, columns=describe(schema)))
    layout = begin(root, plan, tokenizer)
    for shard in shards:
        made = write_shard(layout.shard(shard.name), shard, rows[shard.start : shard.stop], schema)
        record(layout, Receipt(made, shard, ((1, 1),), "cpu", 0.0, 0.0))
    return finish(layout, plan)


def with_example(row, **changes):
    return dataclasses.replace(row, example=dataclasses.replace(row.example, **changes))


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.kind)
def test_isolated_documents_and_the_entropy_of_each_position(tmp_path, lm_tokenizer, encoding):
    rows = [token_row(n, encoding, 320, length=6 + n % 5, known=True) for n in range(20)]
    rows = [
        dataclasses.replace(
            with_example(row, document_lengths=np.asarray([2, row.example.num_tokens - 2], dtype=np.int32)),
            entropy=torch.linspace(0.5, 2.0, len(row.soft)),
        )
        for row in rows
    ]
    check(build_wide(tmp_path / "c", lm_tokenizer, encoding, rows, documents=True, entropy=True), LM, uncertainty=True)


def test_token_types_and_another_tokenizer(tmp_path, lm_tokenizer, bert_tokenizer):
    rows = [class_row(n, Full(), 5) for n in range(30)]
    rows = [
        with_example(row, token_type_ids=np.arange(row.example.num_tokens, dtype=np.int32) % 2, text_pair=f"pair {n}")
        for n, row in enumerate(rows)
    ]
    cache = build_wide(tmp_path / "c", lm_tokenizer, Full(), rows, token_type_ids=True, text=True, text_pair=True)
    check(cache, CLASSES)
    anew = Collator(CLASSES, bert_tokenizer, 1.0, retokenize=Tokenization(12), pad_id=FILL)
    for batch in loader(cache.dataset("train", window=OPEN), anew):
        chosen = [rows[i].example for i in batch["source_rows"].tolist()]
        pairs = [bert_tokenizer(e.text, e.text_pair, truncation=True, max_length=12)["input_ids"] for e in chosen]
        assert torch.equal(batch["inputs"]["input_ids"], padded(pairs, FILL))
        assert batch["labels"].tolist() == [-100 if e.label is None else e.label for e in chosen]


def test_rows_of_several_caches(tmp_path, lm_tokenizer):
    caches = [
        build_cache(tmp_path / f"c{n}", lm_tokenizer, encoding=TopK(4), classes=320, per_shard=n, shards=2)
        for n in (9, 14)
    ]
    rows = [(cache, row) for cache in caches for row in stored(cache)]
    data = JoinedDataset(caches, "train", window=OPEN)
    found = loader(data, Collator(LM, lm_tokenizer, 1.0, pad_id=FILL))
    for batch, numbers in zip(found, found.batch_sampler, strict=True):
        assert_batch(batch, expected(caches[0], [rows[i][1] for i in numbers], [1.0] * len(numbers), 1.0))


def test_the_entropy_of_each_position_counts_where_all_caches_have_it(tmp_path, lm_tokenizer):
    rows = [token_row(n, Sampled(6.0), 320) for n in range(8)]
    known = [dataclasses.replace(row, entropy=torch.full((len(row.soft),), 9.0)) for row in rows]
    caches = [
        build_wide(tmp_path / "known", lm_tokenizer, Sampled(6.0), known, entropy=True),
        build_wide(tmp_path / "sums", lm_tokenizer, Sampled(6.0), rows),
    ]
    collator = Collator(LM, lm_tokenizer, 1.0)
    data = TrainingRows(JoinedDataset(caches, "train", window=OPEN))
    entropies = [
        -collator.collate(data.__getitems__(numbers)).target.negative_entropy for numbers in ([0, 1], [0, 8], [8, 0])
    ]
    assert entropies[0].tolist() == [9.0] * len(entropies[0])
    for found in entropies[1:]:
        assert found.numpy() == pytest.approx(rows[0].teacher_entropy_sum / len(rows[0].soft))


# ------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.kind)
def test_rows_of_a_block_are_the_rows_and_any_cut_of_them(tmp_path, lm_tokenizer, encoding):
    cache = build_cache(tmp_path / "c", lm_tokenizer, encoding=encoding, per_shard=13, shards=3)
    rows = list(cache.dataset("train"))
    for size in (1, 5, 13, 20, 100, None):
        found = [row for block in cache.dataset("train", window=1).blocks(size) for row in rows_of(block)]
        assert [row.content_hash for row in found] == [row.content_hash for row in rows]
        assert all(torch.equal(a.soft.top_logprobs, b.soft.top_logprobs) for a, b in zip(found, rows, strict=True))
    numbers = np.array([3, 4, 5, 38, 12, 13, 14, 0])
    data = cache.dataset("train")
    segments = data.segments(numbers)
    assert [(start, stop) for _, start, stop in segments] == [(3, 6), (12, 13), (12, 13), (0, 2), (0, 1)]
    assert gather(segments).numbers["source_row"].tolist() == numbers.tolist()
    assert list(gather(segments, names={"label", "piece"}).numbers) == ["piece"]


def test_no_row_group_is_decoded_before_a_row_of_it_is_due(tmp_path, lm_tokenizer, monkeypatch):
    """The cost of the first batch is bounded by its rows, not by the cache."""
    from pipeline.cache.reading import reader

    read = []
    plain = reader.unpack
    monkeypatch.setattr(reader, "unpack", lambda *args: read.append(1) or plain(*args))
    data = build_cache(tmp_path / "c", lm_tokenizer, per_shard=2, shards=16).dataset("train", window=OPEN)
    first = next(iter(BatchOrder(data, 8, seed=3)))
    TrainingRows(data).__getitems__(first)
    assert len(read) == len({i // 2 for i in first}) <= 8
