"""The fused loss against dense PyTorch in float64.

Compares value and gradients of hidden states, matrix and bias, at awkward sizes.
"""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.errors import TrainingError
from pipeline.records import Full, Loss, Sampled, Spans, Target, TopK, TopP
from pipeline.softlabels import encode, target
from pipeline.training import distillation_loss
from pipeline.training.fused import Head, fused_loss, fused_scores, scores_of
from tests.training.test_divergences import KINDS

ENCODINGS = {"full": Full(), "top-k": TopK(5, (1.0, 2.0)), "sampled": Sampled(6.0)}


def wide(goal: Target) -> Target:
    """Return the target in float64, to exclude the rounding of the target from the comparison."""
    parts = {name: getattr(goal, name) for name in ("offsets", "ids")}
    rest = None if goal.log_residual is None else goal.log_residual.double()
    return Target(
        goal.num_classes,
        log_residual=rest,
        weights=goal.weights.double(),
        negative_entropy=goal.negative_entropy.double(),
        **parts,
    )


def make(
    count: int,
    classes: int,
    encoding,
    temperature: float,
    *,
    padded: int = 0,
    bias: bool = False,
    spread: float = 1.0,
    tail: str = "ghost",
):
    generator = torch.Generator().manual_seed(count + classes)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    goal = wide(target(encode(draw(count, classes) * 2, encoding, generator=generator), temperature, tail=tail))
    hidden, weight = draw(count, 7).requires_grad_(), (draw(classes + padded, 7) * spread).requires_grad_()
    offset = draw(classes + padded).requires_grad_() if bias else None
    labels = torch.randint(0, classes, (count,), generator=generator)
    labels[::3] = -100
    weights = torch.ones(count, dtype=torch.float64)
    if count > 4:
        weights[-1] = 0.0
    return hidden, weight, offset, goal, labels, weights


def assert_equal_to_dense(
    hidden, weight, offset, goal, labels, weights, loss, temperature, *, scale=1.0, cap=math.inf, **counts
):
    head = Head(weight, offset, scale, cap)
    leaves = [leaf for leaf in (hidden, weight, offset) if leaf is not None]
    soft_weights = weights * torch.linspace(0.5, 1.5, len(weights), dtype=torch.float64)
    shared = {
        "labels": labels,
        "loss": loss,
        "temperature": temperature,
        "weights": weights,
        "soft_weights": soft_weights,
        **counts,
    }
    dense = distillation_loss(head.logits(hidden), goal, **shared)
    expected = torch.autograd.grad(dense.total, leaves, allow_unused=True)
    for chunk in (1, 4, 1000):
        fused = fused_loss(hidden, head, goal, chunk_positions=chunk, **shared)
        terms = [name for name, weight in (("hard_sum", loss.hard_weight), ("soft_sum", loss.soft_weight)) if weight]
        for name in ("total", "num_hard", "num_soft", "span_sum", "num_spans", *terms):
            torch.testing.assert_close(
                getattr(fused, name), getattr(dense, name), rtol=1e-9, atol=1e-10, check_dtype=False
            )
        found = torch.autograd.grad(fused.total, leaves)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("count", [1, 13])
@pytest.mark.parametrize("classes", [2, 41, 401, 1271])
@pytest.mark.parametrize("kind", list(ENCODINGS))
@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.0, 1.0), (1.0, 0.0)])
def test_value_and_gradients_are_the_dense_ones(count, classes, kind, weights):
    assert_equal_to_dense(*make(count, classes, ENCODINGS[kind], 1.0, bias=True), Loss(*weights), 1.0)


@pytest.mark.parametrize("kind", ["full", "top-k"])
@pytest.mark.parametrize("divergence", KINDS)
def test_every_divergence_at_another_temperature(kind, divergence):
    assert_equal_to_dense(*make(9, 41, ENCODINGS[kind], 2.0), Loss(0.4, 0.6, divergence=divergence), 2.0)


@pytest.mark.parametrize("tail", ["ghost", "renormalize", "ignore"])
@pytest.mark.parametrize("encoding", [TopK(5, (1.0, 2.0)), TopP(0.7, (1.0, 2.0))])
@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
def test_every_tail_policy(encoding, tail, temperature):
    parts = make(9, 41, encoding, temperature, tail=tail)
    assert_equal_to_dense(*parts, Loss(0.4, 0.6, tail=tail), temperature)


def test_logit_mse():
    assert_equal_to_dense(*make(9, 41, Full(), 1.0), Loss(0.4, 0.6, divergence="logit-mse"), 1.0)


@pytest.mark.parametrize("kind", list(ENCODINGS))
@pytest.mark.parametrize(("scale", "cap"), [(0.25, math.inf), (1.0, 3.0), (2.0, 5.0)])
def test_scales_and_soft_caps(kind, scale, cap):
    assert_equal_to_dense(*make(9, 41, ENCODINGS[kind], 1.0), Loss(0.4, 0.6), 1.0, scale=scale, cap=cap)


def test_padded_rows_of_the_matrix_get_no_gradient():
    hidden, weight, offset, goal, labels, weights = make(9, 41, ENCODINGS["sampled"], 1.0, padded=7, bias=True)
    assert_equal_to_dense(hidden, weight, offset, goal, labels, weights, Loss(0.4, 0.6), 1.0)


def test_counts_of_a_larger_batch():
    assert_equal_to_dense(
        *make(9, 41, ENCODINGS["top-k"], 2.0),
        Loss(0.4, 0.6),
        2.0,
        num_hard=torch.tensor(20.0),
        num_soft=torch.tensor(30.0),
    )


def test_a_student_that_is_nearly_sure_has_finite_gradients():
    """The student's mass outside the kept classes is below the smallest float.

    The loss is large but finite.
    """
    goal = target(encode(torch.zeros(2, 41), TopK(5, (1.0,))), 1.0)
    hidden = torch.full((2, 3), 50.0, requires_grad=True)
    weight = torch.zeros(41, 3)
    weight[int(goal.ids[0])] = 3.0
    weight.requires_grad_()
    labels = torch.tensor([7, -100])
    terms = fused_loss(
        hidden,
        Head(weight),
        goal,
        labels=labels,
        loss=Loss(),
        temperature=1.0,
        weights=torch.ones(2),
        soft_weights=torch.ones(2),
    )
    terms.total.backward()
    assert float(terms.soft_sum) > 100
    assert torch.isfinite(terms.total)
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()
    assert float(weight.grad.abs().max()) > 0


def test_everything_masked_is_a_loss_of_zero_with_a_gradient_of_zero():
    hidden, weight, _, goal, labels, weights = make(5, 41, ENCODINGS["sampled"], 1.0)
    nothing = torch.zeros_like(weights)
    terms = fused_loss(
        hidden, Head(weight), goal, labels=labels, loss=Loss(), temperature=1.0, weights=nothing, soft_weights=nothing
    )
    assert float(terms.total.detach()) == 0.0
    assert not any(bool(g.any()) for g in torch.autograd.grad(terms.total, [hidden, weight]))


def test_no_position_at_all():
    hidden, weight, _, _, _, _ = make(5, 41, ENCODINGS["sampled"], 1.0)
    empty = encode(torch.zeros(0, 41), ENCODINGS["sampled"])
    none = torch.zeros(0)
    terms = fused_loss(
        hidden[:0],
        Head(weight),
        target(empty, 1.0),
        labels=none.long(),
        loss=Loss(),
        temperature=1.0,
        weights=none,
        soft_weights=none,
    )
    assert float(terms.total.detach()) == 0.0
    assert not bool(torch.autograd.grad(terms.total, weight)[0].any())


def test_a_frozen_matrix_gets_no_gradient_and_costs_none():
    hidden, weight, _, goal, labels, weights = make(9, 41, ENCODINGS["sampled"], 1.0)
    frozen = weight.detach()
    shared = {"labels": labels, "loss": Loss(), "temperature": 1.0, "weights": weights, "soft_weights": weights}
    found = torch.autograd.grad(fused_loss(hidden, Head(frozen), goal, **shared).total, hidden)[0]
    expected = torch.autograd.grad(fused_loss(hidden, Head(weight), goal, **shared).total, hidden)[0]
    torch.testing.assert_close(found, expected)


def test_a_label_that_is_no_class_is_refused():
    hidden, weight, _, goal, labels, weights = make(5, 41, ENCODINGS["sampled"], 1.0)
    labels[1] = 41
    with pytest.raises(TrainingError, match="expected 0 to 40"):
        fused_loss(
            hidden,
            Head(weight),
            goal,
            labels=labels,
            loss=Loss(),
            temperature=1.0,
            weights=weights,
            soft_weights=weights,
        )


def test_under_autocast_the_matrix_products_are_bfloat16_and_the_loss_float32():
    hidden, weight, _, goal, labels, weights = make(9, 401, ENCODINGS["sampled"], 1.0)
    narrow = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    shared = {"labels": labels, "loss": Loss(), "temperature": 1.0, "weights": weights, "soft_weights": weights}
    exact = fused_loss(hidden, Head(weight), goal, **shared).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fused_loss(narrow[0], Head(narrow[1]), goal, **shared).total
    found.backward()
    assert found.dtype == torch.float32
    assert narrow[1].grad.dtype == torch.float32
    assert 0 < abs(float(found.detach()) - float(exact.detach())) < 0.05  # close, but not all in float32
    torch.testing.assert_close(narrow[1].grad.double(), torch.autograd.grad(exact, weight)[0], rtol=0.1, atol=2e-3)


@pytest.mark.parametrize("kind", list(ENCODINGS))
def test_scores_are_those_of_the_logits(kind):
    hidden, weight, offset, goal, labels, _ = make(13, 41, ENCODINGS[kind], 1.0, bias=True)
    head = Head(weight, offset)
    found = fused_scores(hidden, head, goal, labels=labels, loss=Loss(), temperature=1.0)
    expected = scores_of(head.logits(hidden), goal, labels, loss=Loss(), temperature=1.0)
    for name in ("predicted", "confidence", "nll", "divergence"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), equal_nan=True, check_dtype=False, rtol=1e-5, atol=1e-5
        )


def spans_over(labels: torch.Tensor, weights: torch.Tensor) -> Spans:
    """Return spans of two labelled positions each; an odd last position is in no span.

    Every third span has weight 0.
    """
    positions = ((labels != -100) & (weights > 0)).nonzero().squeeze(-1)
    positions = positions[: len(positions) // 2 * 2]
    owner = torch.full_like(labels, -1)
    owner[positions] = torch.arange(len(positions)) // 2
    count = len(positions) // 2
    weighted = torch.linspace(0.5, 2.0, count, dtype=torch.float64)
    weighted[::3] = 0.0
    return Spans(owner, -torch.linspace(0.1, 9.0, count, dtype=torch.float64), weighted)


@pytest.mark.parametrize("weights", [(0.3, 0.7), (1.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, math.inf), (2.0, 5.0)])
@pytest.mark.parametrize("num_spans", [None, 7.5])
def test_aligned_spans_are_the_dense_ones(weights, scale, cap, num_spans):
    parts = make(25, 41, ENCODINGS["sampled"], 1.0, padded=3, bias=True)
    spans = spans_over(*parts[-2:])
    assert len(spans) > 6
    loss = Loss(*weights, span_weight=0.8, span_temperature=3.0)
    assert_equal_to_dense(*parts, loss, 1.0, scale=scale, cap=cap, spans=spans, num_spans=num_spans)


def test_spans_without_a_weight_change_nothing():
    hidden, weight, _, goal, labels, weights = make(25, 41, ENCODINGS["sampled"], 1.0)
    shared = {"labels": labels, "temperature": 1.0, "weights": weights, "soft_weights": weights}
    plain = fused_loss(hidden, Head(weight), goal, loss=Loss(), **shared)
    spans = spans_over(labels, weights)
    beside = fused_loss(hidden, Head(weight), goal, loss=Loss(), spans=spans, **shared)
    assert torch.equal(plain.total, beside.total)
    assert (float(plain.num_spans), float(beside.num_spans)) == (0.0, 0.0)
    added = fused_loss(hidden, Head(weight), goal, loss=Loss(span_weight=0.5), spans=spans, **shared)
    torch.testing.assert_close(added.total - plain.total, 0.5 * added.span_sum / spans.weights.sum())
    assert float(added.span_sum) > 0


def test_spans_that_do_not_fit_are_refused():
    hidden, weight, _, goal, labels, weights = make(25, 41, ENCODINGS["sampled"], 1.0)
    spans = spans_over(labels, weights)
    shared = {"temperature": 1.0, "loss": Loss(span_weight=1.0), "spans": spans}
    none = torch.zeros_like(weights)  # no position counts
    with pytest.raises(
        TrainingError, match="span 1 has a weight above 0, and only 0 of its 2 positions have a hard label"
    ):
        fused_loss(hidden, Head(weight), goal, labels=labels, weights=none, soft_weights=none, **shared)
    with pytest.raises(TrainingError, match="span 1 has a weight above 0, and only 0 of its 2"):
        distillation_loss(Head(weight).logits(hidden), goal, labels=None, **shared)
