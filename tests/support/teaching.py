"""Pretrained encoders without a task head, data files, and short student runs.

Used by the tests of whole tasks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import DatasetDict
from transformers import AutoConfig, AutoModelForMaskedLM, set_seed

from pipeline.cache import Cache
from pipeline.config import TrainStudentConfig
from pipeline.training.run import run
from tests.conftest import TINY


def pretrained(path: Path, tokenizer: Any, seed: int = 0, **overrides: Any) -> Path:
    """Save a random encoder without a head for the task."""
    set_seed(seed)
    config = AutoConfig.for_model("bert", vocab_size=len(tokenizer), pad_token_id=0, **{**TINY["bert"], **overrides})
    AutoModelForMaskedLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write(folder: Path, rows: DatasetDict) -> Path:
    folder.mkdir(exist_ok=True)
    for split, part in rows.items():
        part.to_json(folder / f"{split}.jsonl")
    return folder


def train(cache: Cache, student: Path, output: Path, **settings: Any) -> Any:
    settings = {"max_steps": 120, "batch_size": 16, "learning_rate": 4e-3, "early_stopping": 0, **settings}
    return run(TrainStudentConfig(cache=(str(cache.root),), student=str(student), output=str(output), **settings))
