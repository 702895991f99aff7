"""A small capture of a language model, configured as on the command line."""

from __future__ import annotations

import pytest

from pipeline.cache import Cache
from pipeline.cache.storage.urls import is_url
from pipeline.config import CacheLogitsConfig, DataConfig
from tests.conftest import tiny_model


@pytest.fixture
def config(tmp_path, lm_tokenizer, documents, save_teacher):
    """Return a function that configures a capture of 40 + 12 documents in 7 + 2 shards."""
    teacher = save_teacher(tiny_model("llama", len(lm_tokenizer), spread=3.0), lm_tokenizer)
    data = tmp_path / "data"
    data.mkdir()
    for split, rows in documents.items():
        rows.to_json(data / f"{split}.jsonl")

    def make(output="cache", *, text_column="text", **settings):
        return CacheLogitsConfig(
            task="causal-lm",
            data=DataConfig(dataset=str(data), max_length=64, text_column=text_column),
            teacher=str(teacher),
            **{
                "output": output if is_url(output) else str(tmp_path / output),
                "rows_per_shard": 6,
                "batch_tokens": 256,
                **settings,
            },
        )

    return make


def hashes(cache: Cache) -> dict[str, str]:
    return {shard.name: shard.sha256 for shard in cache.manifest.shards}
