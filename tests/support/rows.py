"""Cache rows made from random logits, for tests of the stored format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pipeline.cache import Cache, Plan
from pipeline.cache.format.codec import content_hash
from pipeline.cache.format.rows import block_of
from pipeline.cache.format.schema import cache_schema, describe
from pipeline.cache.writing.build import begin, finish, record
from pipeline.cache.writing.writer import write_shard
from pipeline.models import tokenizer_info
from pipeline.records import (
    CachedExample,
    Columns,
    Contract,
    Encoding,
    ModelInfo,
    Receipt,
    RowBlock,
    Sampled,
    ShardPlan,
    SourceInfo,
    Tokenization,
    TokenizedExample,
)
from pipeline.softlabels import encode, narrow
from tests.support.once import once


def token_row(
    number: int, encoding: Encoding, classes: int, *, length: int = 9, seed: int = 0, known: bool = False
) -> CachedExample:
    """Return a row of a language model's cache.

    Args:
        known: whether the teacher predicts the next token well.
    """
    rng = np.random.default_rng([seed, number])
    ids = rng.integers(0, classes, length).astype(np.int32)
    supervised = rng.random(length) < 0.8
    supervised[0], supervised[-1] = True, False
    count = int(supervised.sum())
    logits = torch.from_numpy(rng.normal(size=(count, classes)) * 2)
    if known:
        logits[torch.arange(count), torch.from_numpy(ids[np.flatnonzero(supervised) + 1].astype(np.int64))] += 3.0
    uniforms = torch.from_numpy(rng.random(count))
    soft = narrow(encode(logits, encoding, uniforms=uniforms), uniforms)
    example = TokenizedExample(
        source_row=number,
        piece=0,
        input_ids=ids,
        supervised=supervised,
        text_bytes=3 * count,
        kept={"id": f"row-{number}"},
    )
    return CachedExample(example, soft, float(rng.random()), float(rng.random()), content_hash(example))


def class_row(number: int, encoding: Encoding, classes: int, *, seed: int = 0) -> CachedExample:
    """Return a row of a classifier's cache; every third has no label."""
    rng = np.random.default_rng([seed, number])
    logits = torch.from_numpy(rng.normal(size=(1, classes)) * 2)
    example = TokenizedExample(
        source_row=number,
        piece=0,
        input_ids=rng.integers(0, 100, rng.integers(2, 9)).astype(np.int32),
        label=None if number % 3 == 2 else int(rng.integers(classes)),
        text=f"text {number} \u00e9\U0001f600",
    )
    uniforms = torch.from_numpy(rng.random(1))
    soft = narrow(encode(logits, encoding, uniforms=uniforms), uniforms)
    return CachedExample(example, soft, float(rng.random()), float(rng.random()), content_hash(example))


def block_from(*rows: CachedExample) -> RowBlock:
    """Return the rows as a block of columns."""
    first = rows[0]
    schema = cache_schema(
        first.soft.encoding,
        first.soft.num_classes,
        labels="row" if first.example.supervised is None else "tokens",
        marks_positions=first.example.supervised is not None,
        text=first.example.text is not None,
        entropy=first.entropy is not None,
    )
    return block_of(rows, schema)


def make_plan(
    tokenizer, encoding: Encoding, classes: int, shards: tuple[ShardPlan, ...], *, tokens: bool, kept=None
) -> tuple[Plan, object]:
    schema = cache_schema(
        encoding, classes, labels="tokens" if tokens else "row", marks_positions=tokens, text=not tokens, kept=kept
    )
    contract = Contract(
        task="causal-lm" if tokens else "sequence-classification",
        encoding=encoding,
        num_classes=classes,
        label_names=None if tokens else tuple(f"class {i}" for i in range(classes)),
        teacher=ModelInfo("tiny", None, "TinyModel", "0" * 64, 1000, "float32", "eager"),
        tokenizer=tokenizer_info(tokenizer),
        source=SourceInfo("in-memory", None, None, Columns(), {"train": "0" * 64}),
        tokenization=Tokenization(64),
        store_text=not tokens,
        batch_tokens=100,
        seed=0,
        versions={"torch": "0"},
        columns=describe(schema),
    )
    return Plan(contract, shards), schema


def build_cache(
    root: Path,
    tokenizer,
    *,
    encoding: Encoding | None = None,
    classes: int = 41,
    tokens: bool = True,
    per_shard: int = 30,
    shards: int = 2,
    splits: tuple[str, ...] = ("train",),
):
    """Write a finished cache with `shards` shards in each split.

    Caches with the same settings are written once and copied.
    """
    encoding = encoding or Sampled(6.0)
    settings = (encoding, classes, tokens, per_shard, shards, splits)
    named = (tokenizer.backend_tokenizer.to_str(), str(tokenizer.init_kwargs), str(tokenizer.special_tokens_map))
    once(("build_cache", settings, named), lambda folder: _build(folder, tokenizer, *settings), root)
    return Cache.open(root)


def _build(
    root: Path,
    tokenizer,
    encoding: Encoding,
    classes: int,
    tokens: bool,
    per_shard: int,
    shards: int,
    splits: tuple[str, ...],
) -> None:
    import pyarrow as pa

    plans = tuple(
        ShardPlan(f"{split}-{i:05d}", split, i * per_shard, (i + 1) * per_shard)
        for split in splits
        for i in range(shards)
    )
    plan, schema = make_plan(
        tokenizer, encoding, classes, plans, tokens=tokens, kept={"id": pa.string()} if tokens else None
    )
    layout = begin(root, plan, tokenizer)
    for shard in plans:
        make = (
            (lambda n: token_row(n, encoding, classes, known=True))
            if tokens
            else (lambda n: class_row(n, encoding, classes))
        )
        rows = [make(n) for n in range(shard.start, shard.stop)]
        written = write_shard(layout.shard(shard.name), shard, rows, schema)
        record(layout, Receipt(written, shard, ((1, 1),), "cpu", 0.0, 0.0))
    finish(layout, plan)
