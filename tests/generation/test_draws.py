"""Draws follow the model's probabilities and are independent of other rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pipeline.generation.draws import SeededDraws, exponentials, stream_key
from pipeline.generation.records import Sampling

V = 13
LOGITS = torch.randn(V, generator=torch.Generator().manual_seed(3)) * 1.5


def sampling(**settings):
    usual = {"num_samples": 1, "max_new_tokens": 8, "temperature": 1.0, "stop": (), "seed": 0}
    return Sampling(**{**usual, "top_p": None, "top_k": None, "min_p": None, **settings})


def keys_of(count, *, seed=0, split="train", sample=0):
    return torch.tensor([stream_key(seed, split, row, sample) for row in range(count)])


def drawn(settings, keys, *, steps=1, logits=LOGITS, num_classes=V):
    """(B, steps) drawn tokens, and the `SeededDraws` that drew them."""
    draws = SeededDraws(settings, keys, num_classes)
    scores = logits.expand(len(keys), -1)
    empty = torch.zeros(len(keys), 0, dtype=torch.int64)
    return torch.stack([draws(empty, scores).argmax(-1) for _ in range(steps)], 1), draws


def expected(settings):
    scores = (LOGITS / settings.temperature)[None]
    for value, warper in (
        (settings.top_k, lambda v: TopKLogitsWarper(top_k=v)),
        (settings.top_p, lambda v: TopPLogitsWarper(top_p=v)),
        (settings.min_p, lambda v: MinPLogitsWarper(min_p=v)),
    ):
        if value is not None:
            scores = warper(value)(None, scores)
    return torch.softmax(scores.double(), -1)[0].numpy()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_p": 0.8},
        {"top_k": 5},
        {"min_p": 0.2},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    ],
)
@pytest.mark.parametrize("top", [64, 4])
def test_tokens_are_drawn_with_their_probabilities(settings, top, monkeypatch):
    """Chi-square test of 20,000 draws (4,000 rows of 5 steps); filtered tokens are never drawn.

    `top` most likely tokens are drawn individually and the rest together: all of them, or 4 of 13.
    """
    monkeypatch.setattr("pipeline.generation.draws._TOP", top)
    settings = sampling(**settings)
    tokens, _ = drawn(settings, keys_of(4000), steps=5)
    counts, wanted = np.bincount(tokens.flatten().numpy(), minlength=V), expected(settings)
    assert counts[wanted == 0].sum() == 0
    possible = wanted > 0
    found = stats.chisquare(counts[possible], wanted[possible] * counts.sum())
    assert found.pvalue > 1e-3


def test_the_noise_is_exponential_and_independent_over_rows_steps_and_tokens():
    noise = exponentials(keys_of(200), 0, torch.arange(500)[None])
    assert noise.shape == (200, 500)
    assert noise.dtype == torch.float64
    assert float(noise.min()) > 0
    assert stats.kstest(noise.flatten().numpy(), "expon").pvalue > 1e-3
    later = exponentials(keys_of(200), 1, torch.arange(500)[None])
    for one, other in ((noise, later), (noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])):
        correlation = np.corrcoef(one.flatten().numpy(), other.flatten().numpy())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(one.numel())


def test_a_draw_depends_on_no_other_row():
    settings, keys = sampling(), keys_of(64)
    together, _ = drawn(settings, keys, steps=4)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled, _ = drawn(settings, keys[order], steps=4)
    alone = torch.cat([drawn(settings, keys[i : i + 1], steps=4)[0] for i in range(64)])
    assert torch.equal(together[order], shuffled)
    assert torch.equal(together, alone)


def test_seed_split_row_and_sample_have_their_own_streams():
    found = {
        stream_key(seed, split, row, sample)
        for seed in (0, 1)
        for split in ("train", "test")
        for row in range(50)
        for sample in range(4)
    }
    assert len(found) == 2 * 2 * 50 * 4
    settings = sampling()
    first, _ = drawn(settings, keys_of(200), steps=3)
    for other in (keys_of(200, seed=1), keys_of(200, split="test"), keys_of(200, sample=1)):
        assert not torch.equal(first, drawn(settings, other, steps=3)[0])


def test_log_probabilities_are_the_models_own():
    """Log-probabilities are at temperature 1, without filters, over the classes that are tokens."""
    wide = torch.cat([LOGITS, torch.full((3,), 50.0)])  # padded embedding rows
    tokens, draws = drawn(sampling(temperature=0.5, top_k=3), keys_of(100), logits=wide)
    assert int(tokens.max()) < V
    plain = torch.log_softmax(LOGITS.double(), -1)
    assert torch.allclose(draws.logprobs[0], plain[tokens[:, 0]], atol=1e-5)


def test_temperature_zero_takes_the_most_likely():
    tokens, _ = drawn(sampling(temperature=0.0), keys_of(5))
    assert tokens.flatten().tolist() == [int(LOGITS.argmax())] * 5
