"""The columns of a generated data set, which have plain Parquet types only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from pipeline.errors import MisuseError
from pipeline.generation.records import Asked, Completion
from pipeline.records import NO_LABEL


def generated_schema(*, labelled: bool, kept: Mapping[str, pa.DataType]) -> pa.Schema:
    """Return the Arrow schema of every shard.

    Args:
        labelled: with a template: add the example's text and label, under the names that
            `cache-logits` reads.
        kept: name -> type of the columns copied from the prompts.

    Raises:
        MisuseError: a kept column has the name of one of these columns.
    """
    columns: dict[str, pa.DataType] = {"source_row": pa.int64(), "sample": pa.int32()}
    if labelled:
        columns |= {"text": pa.string(), "label": pa.string()}
    columns |= {
        "prompt": pa.string(),
        "completion": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "prompt_tokens": pa.int32(),
        "completion_tokens": pa.int32(),
        "finish_reason": pa.string(),
        "logprob": pa.float64(),
        "ids_from": pa.string(),
    }
    for name, kind in kept.items():
        if name in columns:
            raise MisuseError(
                f"--keep-column {name}: a generated data set has a column of this name already; rename the source's"
            )
        columns[name] = kind
    return pa.schema(list(columns.items()))


def table_of(rows: Sequence[tuple[Asked, Completion]], schema: pa.Schema) -> pa.Table:
    """Build a table of completions, in the given order."""
    labelled = "label" in schema.names
    return pa.Table.from_pylist([_row(asked, found, labelled=labelled) for asked, found in rows], schema=schema)


def _row(asked: Asked, found: Completion, *, labelled: bool) -> dict[str, object]:
    prompt = asked.prompt
    learnt = np.concatenate([np.full(len(prompt.input_ids), NO_LABEL, dtype=np.int32), found.token_ids])
    example = {"text": found.text.strip(), "label": prompt.label} if labelled else {}
    return {
        "source_row": prompt.source_row,
        "sample": asked.sample,
        **example,
        "prompt": prompt.text,
        "completion": found.text,
        "input_ids": np.concatenate([prompt.input_ids, found.token_ids]),
        "labels": learnt,
        "prompt_tokens": len(prompt.input_ids),
        "completion_tokens": len(found.token_ids),
        "finish_reason": found.finish_reason,
        "logprob": found.logprob,
        "ids_from": found.ids_from,
        **prompt.kept,
    }
