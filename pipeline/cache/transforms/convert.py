"""Convert a cache to a smaller encoding, if that loses no exactness (`softlabels.convert`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.cache.format.codec import narrowed, pack, pack_soft, positions_in_rows, positions_of, unpack, unpack_soft
from pipeline.cache.format.schema import describe, soft_columns
from pipeline.cache.reading.reader import Cache
from pipeline.cache.transforms.rewrite import Piece, Rewrite, ancestry, plan_pieces, rewrite, shard_schema
from pipeline.records import NO_LABEL, Encoding, Full, Ragged, RowBlock, Sampled, check_is_encoding
from pipeline.softlabels import check_conversion, counter_uniforms, teacher_scores
from pipeline.softlabels import convert as convert_soft_labels
from pipeline.softlabels.names import encoding_name


def convert(cache: Cache | str | Path, output: str | Path, *, encoding: Encoding, overwrite: bool = False) -> Cache:
    """Write the rows of a cache in a smaller encoding.

    From `full`, the result is what a capture with this encoding and the same seed would have kept,
    up to the rounding of the stored logits.

    Returns:
        The new cache. Columns other than soft labels are copied.

    Raises:
        EncodingError: the encoding cannot be made from the stored one; says why.
        CacheError: see `rewrite`.
    """
    return rewrite(plan_convert(cache, output, encoding=encoding), overwrite=overwrite)


def plan_convert(cache: Cache | str | Path, output: str | Path, *, encoding: Encoding) -> Rewrite:
    """Check the inputs of `convert` and return the planned rewrite."""
    opened = cache if isinstance(cache, Cache) else Cache.open(cache)
    contract = opened.manifest.contract
    check_is_encoding(encoding)
    check_conversion(contract.encoding, encoding)
    schema = _schema(shard_schema(opened), contract.encoding, encoding, contract.num_classes)
    # Columns that change: those of the encoding; and the entropy, if it is of a distribution at
    # another temperature.
    anew = isinstance(contract.encoding, Full) and isinstance(encoding, Sampled) and encoding.temperature != 1.0
    changed = {*soft_columns(encoding, contract.num_classes), *(("teacher_entropy_sum", "entropy") if anew else ())}
    changed_schema = pa.schema([field for field in schema if field.name in changed])

    def change(piece: Piece) -> Iterable[pa.Table]:
        for table in piece.row_groups():
            block = unpack(table, contract.encoding, contract.num_classes)
            made = _convert(block, encoding, piece.plan.split, contract.seed, entropy_anew=anew)
            packed = pack(made, changed_schema)
            yield pa.table(
                [(packed if field.name in changed else table).column(field.name) for field in schema], schema=schema
            )

    return Rewrite(
        name="convert",
        output=output,
        pieces=plan_pieces([opened], opened.splits),
        change=change,
        contract=dataclasses.replace(contract, encoding=encoding, columns=describe(schema)),
        schema=schema,
        ancestors=ancestry([opened], f"convert {encoding_name(contract.encoding)} to {encoding_name(encoding)}"),
        same_encoding=False,
        nothing=f"{opened.root}: has no rows",
    )


def _convert(block: RowBlock, encoding: Encoding, split: str, seed: int, *, entropy_anew: bool) -> RowBlock:
    """Return a block of the columns that change."""
    soft, counts = unpack_soft(block), positions_of(block)
    made = convert_soft_labels(soft, encoding, uniforms=_uniforms(block, encoding, split, seed))
    lists, numbers = pack_soft(made, counts), {}
    if entropy_anew:
        assert isinstance(encoding, Sampled)
        none = torch.full((len(soft),), NO_LABEL)
        logits = soft.top_logprobs.reshape(len(soft), soft.num_classes)
        entropy = teacher_scores(logits, none, temperature=encoding.temperature).entropy
        sums = [float(part.sum()) for part in torch.split(entropy.double(), counts.tolist())]
        numbers["teacher_entropy_sum"] = np.array(sums, dtype=np.float32)
        lists["entropy"] = Ragged.of(narrowed(entropy.numpy(), np.float16), counts)
    return RowBlock(encoding, block.num_classes, lists, numbers, {})


def _uniforms(block: RowBlock, encoding: Encoding, split: str, seed: int) -> Tensor:
    """Return the random numbers for sampling at each position.

    From `full`, they are those that a capture would use. From `sampled`, they are independent of
    the numbers that the stored sample was drawn with.
    """
    if isinstance(block.encoding, Sampled) and isinstance(encoding, Sampled):
        split = f"{split} sampled again at {encoding.sample_size}"
    numbers = zip(
        block.numbers["source_row"].tolist(), block.numbers["piece"].tolist(), positions_in_rows(block), strict=True
    )
    return torch.cat([counter_uniforms(seed, split, row, piece, positions) for row, piece, positions in numbers])


def _schema(before: pa.Schema, source: Encoding, wanted: Encoding, num_classes: int) -> pa.Schema:
    """Return the schema with the soft-label columns replaced by those of the new encoding."""
    old, new = soft_columns(source, num_classes), soft_columns(wanted, num_classes)
    first = next(i for i, name in enumerate(before.names) if name in old)
    kept = [[field for field in part if field.name not in old] for part in (list(before)[:first], list(before)[first:])]
    return pa.schema([*kept[0], *(pa.field(name, kind) for name, kind in new.items()), *kept[1]])
