"""Captures and generation with a real vLLM server (`make test-vllm`)."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset

import pipeline as softlabel
from pipeline.capture.teachers.served import join, serve
from pipeline.models import load_model
from pipeline.records import TokenizedExample, TopK
from pipeline.tasks import get_task
from tests.support.vllm import VARIABLE, program, serving

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(
        program() is None, reason=f"{VARIABLE} names no environment with vLLM; make test-vllm makes one"
    ),
]

FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-logprobs", "100", "--max-model-len", "512")
DATA = Path(__file__).parents[2] / "data" / "bbc_lm"
ARTICLES, K = 20, 50


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The URL of one server for all tests, as it takes a minute to start."""
    with serving(DATA / "smollm2", tmp_path_factory.mktemp("vllm") / "vllm.log", *FLAGS) as found:
        yield found


def test_vllm_says_what_the_local_model_says(tmp_path, url):
    articles = load_dataset("json", data_files={"train": str(DATA / "train.jsonl")}, split="train")
    articles = articles.select(range(ARTICLES))
    settings = {"task": "causal-lm", "max_length": 256, "encoding": TopK(K, (1.0,)), "seed": 0}
    caches, speeds = {}, {}
    for name, more in (("local", {}), ("served", {"server": url, "check_with": str(DATA / "smollm2")})):
        started = time.perf_counter()
        caches[name] = softlabel.cache_logits(DATA / "smollm2", articles, tmp_path / name, **settings, **more)
        tokens = sum(shard.tokens for shard in caches[name].manifest.shards)
        speeds[name] = tokens / (time.perf_counter() - started)
    exact = _worst_before_rounding(url, [caches["served"].dataset("train")[i].example for i in range(4)])
    worst = mass = 0.0
    positions = ties = 0
    for ours, theirs in zip(caches["local"].dataset("train"), caches["served"].dataset("train"), strict=True):
        assert ours.example.input_ids.tolist() == theirs.example.input_ids.tolist()
        count = ours.example.num_positions
        ids, other = (row.soft.top_ids.reshape(count, K).numpy() for row in (ours, theirs))
        values, others = (row.soft.top_logprobs.reshape(count, K).numpy() for row in (ours, theirs))
        for n in range(count):
            _, here, there = np.intersect1d(ids[n], other[n], return_indices=True)
            step = np.spacing(np.minimum(values[n][here], others[n][there]).astype(np.float16)).astype(np.float64)
            worst = max(worst, float((np.abs(values[n][here] - others[n][there]) - np.abs(step)).max()))
            apart = set(ids[n]) ^ set(other[n])
            if apart:  # near-ties at the edge of the top; float16 has 11 bits
                ties += 1
                edge = min(values[n].min(), others[n].min())
                at = [values[n][i] for i in range(K) if ids[n][i] in apart]
                at += [others[n][i] for i in range(K) if other[n][i] in apart]
                assert all(value - edge <= 1e-4 + 2.0**-10 * abs(edge) for value in at)
        residuals = [row.soft.log_residuals[:, 0].exp().numpy() for row in (ours, theirs)]
        mass = max(mass, float(np.abs(residuals[0] - residuals[1]).max()))
        positions += count
        assert theirs.teacher_nll_sum == pytest.approx(ours.teacher_nll_sum, abs=2e-3 * count)
    print(
        f"\nvLLM beside a local pass: {positions:,} positions; log-probabilities within {exact:.2g} nats before they are stored (4 rows), and within a float16 step and {max(worst, 0.0):.2g} nats after (all), mass outside the top {K} within {mass:.2g}, "
        f"{ties} positions with a tie at the edge; tokens a second: local {speeds['local']:.0f}, served {speeds['served']:.0f}"
    )
    assert exact <= 2e-3
    assert worst <= 2e-3
    assert mass <= 2e-3
    assert ties <= positions // 100


def test_vllm_writes_what_the_local_model_writes(tmp_path, url):
    """Greedy texts are equal unless two tokens have nearly the same probability."""
    articles = load_dataset("json", data_files={"train": str(DATA / "train.jsonl")}, split="train")
    prompts = articles.select(range(8))
    settings = {"prefix_tokens": 32, "max_new_tokens": 32, "temperature": 0.0, "seed": 0}
    found = {}
    for name, more in (("local", {}), ("served", {"server": [url]})):
        softlabel.generate(str(DATA / "smollm2"), prompts, tmp_path / name, **settings, **more)
        found[name] = load_dataset("parquet", data_dir=str(tmp_path / name / "data"), split="train")
    assert len(found["local"]) == len(found["served"]) == 8
    equal = [a == b for a, b in zip(found["local"]["input_ids"], found["served"]["input_ids"], strict=True)]
    served = np.asarray(found["served"]["logprob"], dtype=np.float64)
    local = np.asarray(found["local"]["logprob"], dtype=np.float64)
    apart = np.abs(served - local)[np.asarray(equal)].max(initial=0.0)
    print(
        f"\nvLLM writes as a local pass: {sum(equal)} of 8 texts of 32 tokens equal, their log-probabilities within {apart:.2g} nats"
    )
    assert sum(equal) >= 6
    assert apart <= 2e-2


def test_vllm_judges_as_the_local_model_judges(tmp_path, url):
    texts = [
        "The striker scored twice in the final.",
        "Shares fell after the bank's profit warning.",
        "The film won three awards.",
    ] * 4
    rows = Dataset.from_dict({"text": [f"{i}. {text}" for i, text in enumerate(texts)]})
    settings = {
        "task": "sequence-classification",
        "prompt_template": "default",
        "label_text": ["sport", "business", "film"],
    }
    caches = {
        name: softlabel.cache_logits(str(DATA / "smollm2"), rows, tmp_path / name, **settings, **more)
        for name, more in (("local", {}), ("served", {"server": url}))
    }
    local, served = (
        np.stack([row.soft.top_logprobs.numpy() for row in caches[name].dataset("train")]) for name in caches
    )
    print(f"\nvLLM judges as a local pass: log-probabilities of labels within {np.abs(local - served).max():.2g} nats")
    assert np.abs(local - served).max() <= 1e-2


def _worst_before_rounding(url: str, rows: list[TokenizedExample]) -> float:
    """The largest difference in nats of a log-probability between the server and a local pass."""
    task = get_task("causal-lm")
    local = load_model(task, str(DATA / "smollm2"))
    teacher = serve(task, str(DATA / "smollm2"), local.tokenizer, [url], top_logprobs=K)
    worst = 0.0
    for row in rows:
        found = join([future.result() for future in teacher.ask(row)])
        with torch.inference_mode():
            logits = local.model(input_ids=torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0]
        logprobs = torch.log_softmax(logits.double(), -1).numpy()[np.flatnonzero(row.supervised)]
        worst = max(worst, float(np.abs(np.take_along_axis(logprobs, found.ids, -1) - found.logprobs).max()))
        own = row.input_ids[np.flatnonzero(row.supervised) + 1].astype(np.int64)
        worst = max(worst, float(np.abs(logprobs[np.arange(len(own)), own] - found.own).max()))
    teacher.close()
    return worst
