"""Converting soft labels to smaller encodings is as exact or unbiased as encoding the logits."""

from __future__ import annotations

import pytest
import torch

from pipeline.errors import EncodingError
from pipeline.records import Full, Sampled, TopK, TopP
from pipeline.softlabels import convert, encode, narrow, rows, target

V = 57
GRID = (1.0, 2.0, 4.0)


def logits(count: int = 40, spread: float = 3.0):
    found = torch.randn(count, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * spread
    found[3, 10:] = -torch.inf
    return found


def uniforms(count: int, seed: int = 0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(soft, temperature: float = 1.0):
    """Return the target's weights as (N, V)."""
    goal = target(soft, temperature)
    owner = torch.repeat_interleave(torch.arange(len(goal)), goal.offsets.diff())
    return torch.zeros(len(goal), V).index_put((owner, goal.ids), goal.weights, accumulate=True)


@pytest.mark.parametrize("wanted", [TopK(5), TopP(0.8), Sampled(6.0), Sampled(9.0, 2.0)], ids=str)
def test_full_becomes_what_encoding_the_logits_gives(wanted):
    u = uniforms(40)
    made = convert(encode(logits(), Full()), wanted, uniforms=u)
    expected = narrow(encode(logits(), wanted, uniforms=u), u)
    assert torch.equal(made.top_ids, expected.top_ids)
    assert torch.equal(made.tail_ids, expected.tail_ids)
    torch.testing.assert_close(made.top_logprobs, expected.top_logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.log_residuals, expected.log_residuals, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (TopK(20), TopK(5)),
        (TopK(20), TopK(1, (2.0,))),
        (TopK(20), TopK(20, (1.0, 4.0))),
        (TopK(V), TopK(30)),
        (TopP(0.99), TopP(0.7)),
        (TopP(0.9), TopP(0.9, (4.0,))),
    ],
    ids=str,
)
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_what_leaves_the_top_is_added_to_the_residual_exactly(source, wanted, spread):
    made = convert(encode(logits(spread=spread), source), wanted, uniforms=uniforms(40))
    expected = encode(logits(spread=spread), wanted)
    assert torch.equal(made.top_offsets, expected.top_offsets)
    assert torch.equal(made.top_ids, expected.top_ids)
    torch.testing.assert_close(made.top_logprobs, expected.top_logprobs)
    torch.testing.assert_close(made.log_residuals, expected.log_residuals, rtol=2e-5, atol=2e-5)
    assert made.encoding == wanted


def standard_error(q, draws: int, sample_size: float = 6.0):
    """Return the standard error of the mean weight of a class.

    E[weight^2] is at most q / c where q < 1/c; above, rounding adds less.
    """
    return (q.clamp(max=1 / sample_size) / sample_size / draws).sqrt()


def test_a_sample_of_a_sample_is_unbiased_and_as_noisy_as_a_sample():
    """Over 6,000 draws: unbiased within 4 standard errors, with the variance of drawing at c'."""
    z = torch.randn(3, V, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2
    draws = 6000
    many = z.repeat(draws, 1)
    u, v, w = (uniforms(len(many), seed) for seed in (1, 2, 3))
    first = narrow(encode(many, Sampled(25.0), uniforms=u), u)
    again = dense(convert(first, Sampled(6.0), uniforms=v)).double().view(draws, 3, V)
    at_once = dense(narrow(encode(many, Sampled(6.0), uniforms=w), w)).double().view(draws, 3, V)
    q = torch.softmax(z, -1)
    assert ((again.mean(0) - q).abs() <= 4 * standard_error(q, draws)).all()
    assert float(again.var(0).sum()) == pytest.approx(float(at_once.var(0).sum()), rel=0.05)


def test_it_would_be_biased_with_the_numbers_of_the_first_draw():
    """Reusing the first draw's uniforms biases the result, so `convert` needs independent ones."""
    z = torch.randn(1, V, generator=torch.Generator().manual_seed(5), dtype=torch.float64).repeat(6000, 1)
    u = uniforms(6000, 1)
    again = dense(convert(narrow(encode(z, Sampled(25.0), uniforms=u), u), Sampled(6.0), uniforms=u)).double()
    q = torch.softmax(z[0], -1)
    assert not ((again.mean(0) - q).abs() <= 4 * standard_error(q, 6000)).all()


def test_the_shape_of_a_sample_is_kept():
    u, v = uniforms(40), uniforms(40, 9)
    first = narrow(encode(logits(), Sampled(25.0), uniforms=u), u)
    made = convert(first, Sampled(6.0), uniforms=v)
    assert torch.equal(made.top_ids[made.top_offsets[:-1]], first.top_ids[first.top_offsets[:-1]])  # the argmax
    for n in range(len(made)):
        part = rows(made, n, n + 1)
        assert (part.tail_ids.diff() > 0).all()
        assert not set(part.tail_ids.tolist()) & set(part.top_ids.tolist())
    steps = made.top_logprobs.double().exp() * made.encoding.steps
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("source", "wanted", "message"),
    [
        (TopK(20), Full(), "cannot be restored"),
        (Sampled(6.0), TopK(3), "random sample"),
        (TopK(5), Sampled(6.0), "not known one by one"),
        (TopP(0.9), TopK(2), "number kept differs"),
        (TopK(5), TopK(5), "expected below the cache's 5, found 5"),
        (TopK(5), TopK(6, (1.0,)), "expected below the cache's 5, found 6"),
        (TopP(0.5), TopP(0.6), "expected below"),
        (TopK(5), TopK(3, (3.0,)), "exactly at 1, 2, 4 only"),
        (Sampled(6.0), Sampled(6.0), "expected below"),
        (Sampled(6.0), Sampled(3.0, 2.0), "has 1 only"),
    ],
    ids=str,
)
def test_what_is_not_honest_is_refused_with_the_reason(source, wanted, message):
    soft = encode(logits(), source, uniforms=uniforms(40))
    with pytest.raises(EncodingError, match=message):
        convert(soft, wanted, uniforms=uniforms(40))
