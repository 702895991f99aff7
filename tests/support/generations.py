"""A small generation, configured as on the command line.

It reads files, and its model ends some of the completions.
"""

from __future__ import annotations

import pytest
from datasets import Dataset

from pipeline.config import GenerateConfig
from pipeline.generation import Generation
from tests.conftest import WORDS, tiny_model


def writing_model(vocabulary: int, *, ends: int = 8, **settings):
    """Return a random model with `ends` tokens that end a completion, EOS among them."""
    model = tiny_model("llama", vocabulary, **{"spread": 3.0, **settings})
    model.generation_config.eos_token_id = [1, *range(vocabulary - ends + 1, vocabulary)]
    return model


@pytest.fixture
def config(tmp_path, lm_tokenizer, save_teacher):
    """Return a function that configures two samples of each of 14 + 4 prompts, in 4 + 1 shards."""
    model = save_teacher(writing_model(len(lm_tokenizer)), lm_tokenizer, "writer")
    data = tmp_path / "prompts"
    data.mkdir()
    for split, count in (("train", 14), ("test", 4)):
        prompts = [" ".join(WORDS[i : i + 1 + i % 5]) + split[0] for i in range(count)]
        rows = {"id": [f"{split}-{i}" for i in range(count)], "prompt": prompts}
        Dataset.from_dict(rows).to_json(data / f"{split}.jsonl")

    def make(output="out", **settings):
        return GenerateConfig(
            **{
                "model": str(model),
                "dataset": str(data),
                "output": str(tmp_path / output),
                "num_samples": 2,
                "max_new_tokens": 10,
                "rows_per_shard": 4,
                "batch_tokens": 128,
                **settings,
            }
        )

    return make


def hashes(found: Generation) -> dict[str, str]:
    return {shard.name: shard.sha256 for shard in found.end.shards}
