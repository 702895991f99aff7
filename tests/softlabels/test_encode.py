"""Encodings and their targets against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import EncodingError, MisuseError
from pipeline.records import Full, Sampled, TopK, TopP
from pipeline.softlabels import concatenate, encode, encode_and_score, most_likely, narrow, target, teacher_scores
from tests.support.profile import examples

ENCODINGS = [Full(), TopK(5), TopP(0.8), Sampled(12.0)]


def logits_of(count: int, classes: int, *, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * spread


def dense(goal, residual_as_class: bool = False) -> torch.Tensor:
    out = torch.zeros(len(goal), goal.num_classes, dtype=torch.float64)
    owner = torch.repeat_interleave(torch.arange(len(goal)), goal.offsets.diff())
    out[owner, goal.ids] = goal.weights.double()
    return out


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_full_serves_any_temperature(temperature):
    logits = logits_of(7, 41)
    goal = target(encode(logits, Full()), temperature)
    torch.testing.assert_close(dense(goal), torch.softmax(logits / temperature, -1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("encoding", [TopK(5), TopK(41), TopP(0.8), TopP(1.0)])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_top_is_exact_on_the_grid(encoding, temperature):
    logits = logits_of(9, 41)
    soft = encode(logits, encoding)
    goal = target(soft, temperature)
    q = torch.softmax(logits / temperature, -1)
    found = dense(goal)
    kept = found > 0
    torch.testing.assert_close(found[kept], q[kept], atol=1e-6, rtol=1e-5)
    assert goal.log_residual is not None
    torch.testing.assert_close(goal.log_residual.exp().double(), q.masked_fill(kept, 0).sum(-1), atol=1e-7, rtol=1e-5)
    assert (found.argmax(-1) == logits.argmax(-1)).all()


def test_top_p_keeps_the_fewest_classes_that_reach_p():
    logits = logits_of(20, 41)
    soft = encode(logits, TopP(0.8))
    ordered = torch.softmax(logits, -1).sort(-1, descending=True).values.cumsum(-1)
    expected = (ordered < 0.8).sum(-1) + 1
    assert soft.top_offsets.diff().tolist() == expected.tolist()


def test_residual_mass_below_the_smallest_float_is_kept_as_its_logarithm():
    logits = torch.full((3, 200), -300.0)
    logits[:, :4] = torch.tensor([0.0, -1.0, -2.0, -3.0])
    soft = encode(logits, TopK(4))
    for point, temperature in enumerate((1.0, 2.0, 4.0)):
        scaled = logits.double() / temperature
        expected = torch.logsumexp(scaled[:, 4:], -1) - torch.logsumexp(scaled, -1)
        torch.testing.assert_close(soft.log_residuals[:, point].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("classes", [41, 401, 5000])
@pytest.mark.parametrize("k", [1, 7, 100])
def test_the_k_largest_by_blocks_are_the_k_largest(classes, k):
    logits = logits_of(40, classes)
    expected = logits.topk(min(k, classes), dim=-1)
    soft = encode(logits, TopK(k))
    assert torch.equal(soft.top_ids.reshape(40, -1), expected.indices)


def test_residual_mass_equals_float64_from_near_one_to_tiny():
    """The log-sum-exp over the classes outside the top keeps its relative precision.

    1 - sum(p) would be 0 from about 1e-8 on.
    """
    shift = torch.linspace(-1, 34, 60, dtype=torch.float64)
    logits = logits_of(60, 1271, spread=0.5)
    logits[:, :5] += shift[:, None]
    soft = encode(logits, TopK(5, (1.0,)))
    outside = logits.scatter(1, soft.top_ids.reshape(60, 5), -torch.inf)
    expected = torch.logsumexp(outside, -1) - torch.logsumexp(logits, -1)
    assert float(expected.exp().max()) > 0.98
    assert float(expected.exp().min()) < 1e-12
    found = soft.log_residuals[:, 0].double()
    torch.testing.assert_close(found.exp(), expected.exp(), rtol=1e-5, atol=0)
    narrowed = soft.log_residuals[:, 0].half().double()
    assert ((narrowed - expected).abs() <= 2.0**-11 * expected.abs() + 1e-6).all()


def test_sampled_top_is_exact_and_argmax_always_kept():
    logits = logits_of(50, 1271, spread=0.1)  # nearly uniform: no class reaches 1/c
    soft = encode(logits, Sampled(12.0), generator=torch.Generator().manual_seed(0))
    assert soft.top_offsets.diff().tolist() == [1] * 50
    assert (soft.top_ids == logits.argmax(-1)).all()
    q = torch.softmax(logits, -1)
    torch.testing.assert_close(soft.top_logprobs.double(), q.max(-1).values.log(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_sampled_weights_sum_to_one_within_one_step(spread):
    logits = logits_of(200, 401, spread=spread)
    goal = target(encode(logits, Sampled(12.0), generator=torch.Generator().manual_seed(0)), 1.0)
    sums = dense(goal).sum(-1)
    assert ((sums - 1).abs() <= 1 / 12 + 1e-6).all()


def test_sampled_takes_its_temperature():
    logits = logits_of(6, 41)
    soft = encode(logits, Sampled(1e6, temperature=2.0))  # c so large that every class is in the top
    torch.testing.assert_close(dense(target(soft, 2.0)), torch.softmax(logits / 2, -1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.kind)
@pytest.mark.parametrize("classes", [2, 41])
def test_classes_of_probability_zero_are_never_kept_as_more(encoding, classes):
    logits = logits_of(5, classes)
    logits[:, 0] = -torch.inf
    logits[3, 1:] = -torch.inf
    logits[3, classes - 1] = 2.0  # one certain class
    goal = target(encode(logits, encoding), 1.0)
    found = dense(goal)
    assert (found[:, 0] == 0).all()
    assert found[3].tolist() == [0.0] * (classes - 1) + [1.0]
    assert not torch.isnan(goal.negative_entropy).any()


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.kind)
@pytest.mark.parametrize(("value", "what"), [(torch.nan, "NaN"), (torch.inf, r"\+inf")])
def test_logits_that_are_no_distribution_are_refused(encoding, value, what):
    logits = logits_of(4, 9)
    logits[2, 3] = value
    with pytest.raises(EncodingError, match=f"position 2: .*{what}"):
        encode(logits, encoding)


def test_no_finite_logit_is_refused():
    with pytest.raises(EncodingError, match=r"position 1: .*no finite logit"):
        encode(torch.tensor([[0.0, 1.0], [-torch.inf, -torch.inf]]), TopK(1))


@pytest.mark.parametrize(
    ("encoding", "temperature", "served"),
    [(TopK(3), 5.0, "serves 1 to 4"), (Sampled(9.0), 2.0, "serves 1, "), (TopP(0.5, (2.0,)), 1.0, "serves 2;")],
)
def test_a_temperature_that_is_not_served_is_refused(encoding, temperature, served):
    with pytest.raises(EncodingError, match=served):
        target(encode(logits_of(2, 9), encoding), temperature)


def test_tail_policies():
    logits = logits_of(6, 41)
    soft, q = encode(logits, TopK(5)), torch.softmax(logits, -1)
    kept = torch.zeros_like(q).scatter(1, soft.top_ids.reshape(6, 5), 1.0).bool()
    top = q.masked_fill(~kept, 0)
    torch.testing.assert_close(dense(target(soft, 1.0, tail="ignore")), top, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        dense(target(soft, 1.0, tail="renormalize")), top / top.sum(-1, keepdim=True), atol=1e-6, rtol=1e-5
    )
    assert target(soft, 1.0, tail="ignore").log_residual is None
    assert target(soft, 1.0, tail="renormalize").log_residual is None


def test_teacher_scores_against_torch():
    logits, labels = logits_of(9, 41), torch.tensor([0, 1, 2, -100, 40, 5, 6, 7, -100])
    scores = teacher_scores(logits, labels)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    torch.testing.assert_close(scores.nll.double(), expected, atol=1e-5, rtol=1e-5)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(scores.entropy.double(), entropy, atol=1e-5, rtol=1e-5)
    softened = torch.distributions.Categorical(logits=logits / 2).entropy()
    torch.testing.assert_close(
        teacher_scores(logits, labels, temperature=2.0).entropy.double(), softened, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "encoding", [*ENCODINGS, Sampled(12.0, 2.0)], ids=lambda e: f"{e.kind}-{getattr(e, 'temperature', 1)}"
)
def test_scores_made_with_the_encoding_are_the_teachers(encoding):
    """Compares with float64: odd V, probability 0, logits far from 0, and a temperature."""
    logits, labels = logits_of(9, 141), torch.tensor([0, 1, 2, -100, 40, 5, 6, 7, -100])
    logits[2, 3:] = -torch.inf
    logits[4] -= 1000.0
    t = getattr(encoding, "temperature", 1.0)
    _, found = encode_and_score(logits.float(), labels, encoding, torch.rand(9, dtype=torch.float64))
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    entropy = torch.distributions.Categorical(logits=logits / t).entropy()
    for scores in (found, teacher_scores(logits.float(), labels, temperature=t)):
        torch.testing.assert_close(scores.nll.double(), nll, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(scores.entropy.double(), entropy, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.kind)
@pytest.mark.parametrize("spread", [0.05, 3.0])
def test_the_most_likely_class_comes_back(encoding, spread):
    """Includes flat distributions, whose stored weights round to 0 or below the tail's."""
    logits = logits_of(200, 50, spread=spread)
    uniforms = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids, logprobs = most_likely(narrow(encode(logits, encoding, uniforms=uniforms), uniforms))
    assert ids.tolist() == logits.argmax(-1).tolist()
    if not isinstance(encoding, Sampled):
        torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1).float())


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.kind)
def test_logits_of_a_model_in_training_are_encoded_too(encoding):
    soft = encode(logits_of(3, 41).requires_grad_(), encoding)
    assert not soft.top_logprobs.requires_grad


@pytest.mark.parametrize("steps", [-1, 70_000])
def test_impossible_settings_of_sampled_are_refused(steps):
    with pytest.raises(MisuseError, match="steps: expected 1 to 65535"):
        Sampled(25.0, steps=steps)
    for size in (0.0, -3.0, float("inf"), float("nan")):
        with pytest.raises(MisuseError, match="sample_size: expected at least 1"):
            Sampled(size)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.kind)
def test_positions_do_not_depend_on_each_other(encoding):
    logits, uniforms = (
        logits_of(70, 141),
        torch.rand(70, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
    )
    whole = encode(logits, encoding, uniforms=uniforms)
    ends = ((0, 4), (4, 4), (4, 70))
    parts = concatenate([encode(logits[a:b], encoding, uniforms=uniforms[a:b]) for a, b in ends])
    for name in ("top_offsets", "top_ids", "top_logprobs", "tail_offsets", "tail_ids", "log_residuals"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("encoding", [*ENCODINGS, TopP(0.9999)], ids=lambda e: e.kind)
def test_extremes_of_narrow_types(dtype, encoding):
    """Uses the largest and smallest float16 and -inf, and V that fills no whole block."""
    logits = torch.zeros(4, 131, dtype=dtype)
    logits[0, 5], logits[1], logits[2, ::2] = 65504.0, -65504.0, 6e-8
    logits[3, 1:] = -torch.inf
    soft = encode(logits, encoding, uniforms=torch.full((4,), 0.3, dtype=torch.float64))
    goal = target(soft, 1.0)
    assert torch.isfinite(goal.weights).all()
    assert not torch.isnan(goal.negative_entropy).any()
    q = torch.softmax(logits.double(), -1)
    if isinstance(encoding, Full | TopK):
        found = dense(goal)
        torch.testing.assert_close(found[found > 0], q[found > 0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("encoding", [TopK(50), TopP(0.3), Sampled(25.0)], ids=lambda e: e.kind)
def test_a_vocabulary_of_300_000(encoding):
    logits = logits_of(3, 300_000, spread=2.5).float()
    soft = encode(logits, encoding, uniforms=torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    goal, q = target(soft, 1.0), torch.softmax(logits.double(), -1)
    owner = torch.repeat_interleave(torch.arange(3), soft.top_offsets.diff())
    torch.testing.assert_close(soft.top_logprobs.double(), q[owner, soft.top_ids].log(), atol=1e-5, rtol=1e-5)
    assert (soft.top_ids[soft.top_offsets[:-1]] == logits.argmax(-1)).all()
    mass = dense(goal).sum(-1) + (0 if goal.log_residual is None else goal.log_residual.exp().double())
    assert ((mass - 1).abs() <= (1 / 25 if isinstance(encoding, Sampled) else 0) + 1e-5).all()


@settings(deadline=None, max_examples=examples(60, 600))
@given(
    st.integers(1, 4),
    st.integers(1, 200),
    st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    st.integers(0, 2**20),
    st.sampled_from([Full(), TopK(1), TopK(7), TopP(0.01), TopP(0.9), Sampled(1.0), Sampled(7.5), Sampled(64.0)]),
)
def test_any_logits_give_a_distribution(count, classes, spread, seed, encoding):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(np.round(rng.normal(size=(count, classes)), 1) * spread)  # rounded: ties
    logits[torch.from_numpy(rng.random((count, classes)) < 0.2)] = -torch.inf
    logits[:, rng.integers(classes)] = 0.0
    soft = encode(logits, encoding, uniforms=torch.from_numpy(rng.random(count)))
    assert len(soft) == count
    goal = target(soft, 1.0)
    assert (goal.weights >= 0).all()
    for n in range(count):
        ids = goal.ids[goal.offsets[n] : goal.offsets[n + 1]].tolist()
        assert ids
        assert len(set(ids)) == len(ids)
        assert min(ids) >= 0
        assert max(ids) < classes
        assert torch.isfinite(logits[n, ids]).all() or isinstance(encoding, Full)
        assert logits[n].max() in logits[n, ids]
    mass = dense(goal).sum(-1) + (0 if goal.log_residual is None else goal.log_residual.exp().double())
    slack = 1 / encoding.sample_size if isinstance(encoding, Sampled) else 0.0
    assert ((mass - 1).abs() <= slack + 1e-5).all()
    if isinstance(encoding, Sampled):  # as stored
        narrowed = narrow(soft, torch.from_numpy(rng.random(count)))
        whole = narrowed.top_logprobs.double().exp() * encoding.steps
        assert ((whole - whole.round()).abs() < 1e-3).all()
        assert ((whole / encoding.steps - soft.top_logprobs.double().exp()).abs() <= 1 / encoding.steps + 1e-6).all()
        assert ((dense(target(narrowed, 1.0)).sum(-1) - 1).abs() <= slack + 1 / encoding.steps + 1e-5).all()
