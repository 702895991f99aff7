"""Caches written by release 0.1 stay readable.

`tests/data/caches` holds one cache for each kind of row; `expected.json` holds the first and last
row of each as that release read them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pipeline.cache import Cache, verify
from pipeline.cli import main
from pipeline.records import CachedExample
from pipeline.training.run import train_student
from tests.conftest import tiny_model

CACHES = Path(__file__).parents[1] / "data" / "caches"
EXPECTED = json.loads((CACHES / "expected.json").read_text(encoding="utf-8"))


def facts(row: CachedExample) -> dict[str, Any]:
    """All fields of a row, with its soft labels reduced to sums."""
    example, soft = row.example, row.soft

    def listed(values: np.ndarray | None) -> list[int] | None:
        return None if values is None else values.tolist()

    return {
        "source_row": example.source_row,
        "piece": example.piece,
        "input_ids": listed(example.input_ids),
        "supervised": None if example.supervised is None else np.flatnonzero(example.supervised).tolist(),
        "token_type_ids": listed(example.token_type_ids),
        "document_lengths": listed(example.document_lengths),
        "label": example.label,
        "text": example.text,
        "text_pair": example.text_pair,
        "messages": example.messages,
        "text_bytes": example.text_bytes,
        "kept": dict(example.kept),
        "positions": len(soft),
        "top_ids": int(soft.top_ids.sum()),
        "tail_ids": int(soft.tail_ids.sum()),
        "top_mass": pytest.approx(float(soft.top_logprobs.exp().sum()), abs=1e-3),
        "log_residuals": pytest.approx(float(soft.log_residuals.sum()), abs=1e-2),
        "nll": pytest.approx(row.teacher_nll_sum, abs=1e-3),
        "entropy": pytest.approx(row.teacher_entropy_sum, abs=1e-3),
        "content_hash": row.content_hash,
        "entropies": None if row.entropy is None else pytest.approx(float(row.entropy.sum()), abs=1e-2),
        "label_logprobs": None
        if row.label_logprobs is None
        else pytest.approx(float(row.label_logprobs.sum()), abs=1e-2),
    }


@pytest.mark.parametrize("name", EXPECTED)
def test_every_row_is_read_as_before(name):
    cache = Cache.open(CACHES / name)
    assert cache.manifest.cache_id == EXPECTED[name]["cache_id"]
    assert not verify(CACHES / name).problems
    rows = cache.dataset("train")
    for place, expected in zip((0, len(rows) - 1), EXPECTED[name]["rows"], strict=True):
        assert facts(rows[place]) == expected


@pytest.mark.parametrize("name", EXPECTED)
def test_it_can_be_looked_at(name):
    result = CliRunner().invoke(main, ["inspect", "--cache", str(CACHES / name)], catch_exceptions=False)
    assert result.exit_code == 0
    assert EXPECTED[name]["cache_id"][:12] in result.output


@pytest.mark.full
@pytest.mark.parametrize("name", ["classes-full", "tokens-sampled"])
def test_a_student_learns_from_it(tmp_path, save_teacher, name):
    cache = Cache.open(CACHES / name)
    names = cache.manifest.contract.label_names
    kind, labels = ("llama", None) if names is None else ("bert", len(names))
    model = tiny_model(kind, len(cache.tokenizer), num_labels=labels)
    student = save_teacher(model, cache.tokenizer, "student")
    result = train_student(str(CACHES / name), str(student), str(tmp_path / "out"))
    assert result.soft_loss is not None
    assert np.isfinite(result.soft_loss)
