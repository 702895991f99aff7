"""The loss over aligned spans against float64 formulas and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.errors import MisuseError, TrainingError
from pipeline.records import Loss, Spans
from pipeline.training.spans import SPAN_TEMPERATURE, check_spans, owned, span_loss, span_sums

TAUS = [0.5, 1.0, 2.0, 100.0]
#: Surprisals of a span in nats, from almost certain to impossible in float32.
NATS = [1e-6, 1e-4, 0.01, 0.3, math.log(2), 1.0, 5.0, 30.0, 150.0, 2000.0]


def singles(logprobs: torch.Tensor) -> Spans:
    """Return spans of one position each."""
    return Spans(torch.arange(len(logprobs)), logprobs, torch.ones(len(logprobs)))


def plain(student: torch.Tensor, teacher: torch.Tensor, tau: float) -> torch.Tensor:
    """Compute the formula directly from surprisals."""
    p, q = torch.exp(-student / tau), torch.exp(-teacher / tau)
    return tau * (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log())


def grid(dtype: torch.dtype, nats=NATS) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.tensor(nats, dtype=dtype)
    student, teacher = torch.meshgrid(values, values, indexing="ij")
    return student.flatten().clone().requires_grad_(), teacher.flatten().clone()


@pytest.mark.parametrize("tau", TAUS)
def test_value_and_gradient_are_those_of_the_formula(tau):
    student, teacher = grid(torch.float64, [0.01, 0.3, math.log(2), 1.0, 3.0, 8.0])
    found, expected = span_loss(student, singles(-teacher), temperature=tau), plain(student, teacher, tau)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    grads = [torch.autograd.grad(value.sum(), student)[0] for value in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)
    assert torch.autograd.gradcheck(lambda nll: span_loss(nll, singles(-teacher), temperature=tau), student)


@pytest.mark.parametrize("tau", TAUS)
def test_float32_is_near_float64_over_the_whole_scale(tau):
    """The gradient agrees to 4 ulp at every point.

    The value agrees unless it is a small difference of two large terms.
    """
    found, expected = [], []
    for dtype, into in ((torch.float32, found), (torch.float64, expected)):
        student, teacher = grid(torch.float32)
        student = student.detach().to(dtype).requires_grad_()
        value = span_loss(student, singles(-teacher.to(dtype)), temperature=tau)
        into += [value.detach().double(), torch.autograd.grad(value.sum(), student)[0].double()]
        assert value.dtype == dtype
    assert all(part.isfinite().all() for part in (*found, *expected))
    torch.testing.assert_close(found[1], expected[1], rtol=2e-6, atol=1e-30)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tau", TAUS)
def test_equal_likelihoods_cost_nothing(tau):
    nats = torch.cat([torch.rand(500) * 20, torch.logspace(-9, 4, 100), torch.zeros(1)]).requires_grad_()
    found = span_loss(nats, singles(-nats.detach()), temperature=tau)
    assert not found.any()
    assert not torch.autograd.grad(found.sum(), nats)[0].any()


@pytest.mark.parametrize("tau", TAUS)
def test_the_ends_of_the_scale(tau):
    """Teachers and students give a text probability 1 (or rounded above it) or 0."""
    inf = math.inf
    cases = {  # (teacher's log-probability, student's nll): the loss
        (0.0, 0.0): 0.0,
        (1e-3, 0.0): 0.0,
        (0.0, 3.0): 3.0,
        (0.0, inf): inf,
        (-inf, inf): 0.0,
        (-inf, 3.0): float(-tau * torch.log1p(-torch.exp(torch.tensor(-3.0 / tau, dtype=torch.float64)))),
        (-3.0, inf): inf,
    }
    for (logprob, nll), expected in cases.items():
        student = torch.tensor([nll], requires_grad=True)
        value = span_loss(student, singles(torch.tensor([logprob])), temperature=tau)
        (grad,) = torch.autograd.grad(value.sum(), student)
        assert float(value.detach()) == pytest.approx(expected, rel=1e-5, abs=1e-5), (logprob, nll)
        assert grad.isfinite().all()
    student = torch.tensor([0.0], requires_grad=True)  # the student is certain of a text with teacher probability 0
    value = span_loss(student, singles(torch.tensor([-inf])), temperature=tau)
    assert 0 < float(value.detach()) < inf
    assert torch.autograd.grad(value.sum(), student)[0] < 0


def test_nothing_is_nan_anywhere_in_float32():
    ends = torch.tensor([-1e-7, 0.0, 1e-45, 2.0**-24, 1e-7, 1.0, 88.0, 104.0, 1e10, 3e38, math.inf])
    student, teacher = (part.flatten() for part in torch.meshgrid(ends, ends, indexing="ij"))
    for tau in (1e-3, 0.5, 1.0, 100.0, 1e6):
        leaf = student.clone().requires_grad_()
        value = span_loss(leaf, singles(-teacher), temperature=tau)
        assert not value.isnan().any()
        assert (value >= 0).all()
        assert torch.autograd.grad(value[value.isfinite()].sum(), leaf)[0].isfinite().all()


def test_a_large_tau_has_a_limit_at_the_scale_of_cross_entropy():
    """The limit is x_S - x_T - x_T log(x_S / x_T), with gradient 1 - x_T / x_S.

    The factor tau keeps it from vanishing.
    """
    student, teacher = grid(torch.float64, [0.3, 1.0, 3.0, 8.0])
    found = span_loss(student, singles(-teacher), temperature=1e6)
    limit = student - teacher - teacher * (student / teacher).log()
    torch.testing.assert_close(found, limit, rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(found.sum(), student)
    torch.testing.assert_close(grad, 1 - teacher / student.detach(), rtol=1e-4, atol=1e-4)
    student, teacher = grid(torch.float64, [0.3, 1.0, 3.0, 8.0])
    (near,) = torch.autograd.grad(span_loss(student, singles(-teacher)).sum(), student)
    torch.testing.assert_close(near, grad, rtol=0.1, atol=0.05)  # the default is near the limit
    assert SPAN_TEMPERATURE == 100.0


def test_a_span_is_the_sum_of_its_positions():
    nll = torch.tensor([0.5, 1.0, 7.0, 0.25, 2.0, 3.0], requires_grad=True)
    spans = Spans(
        torch.tensor([1, 0, -1, 1, 2, 1]), torch.tensor([-0.4, -2.0, math.nan]), torch.tensor([1.0, 0.5, 0.0])
    )
    sums = torch.tensor([1.0, 3.75], requires_grad=True)
    expected = span_loss(sums, singles(torch.tensor([-0.4, -2.0])))
    found = span_loss(nll, spans)
    torch.testing.assert_close(found, torch.cat([expected, torch.zeros(1)]))  # weight 0: NaN has no effect
    total, count = span_sums(nll, spans)
    torch.testing.assert_close(total, expected[0] + 0.5 * expected[1])
    assert float(count) == 1.5
    one, other = torch.autograd.grad(expected[0] + 0.5 * expected[1], sums)[0].tolist()
    (grad,) = torch.autograd.grad(total, nll)
    torch.testing.assert_close(grad, torch.tensor([other, one, 0.0, other, 0.0, other]))
    positions, part = owned(spans)
    assert positions.tolist() == [0, 1, 3, 4, 5]
    torch.testing.assert_close(span_loss(nll[positions], part), found)


def test_no_span_and_no_position():
    nothing = Spans(torch.full((3,), -1), torch.zeros(0), torch.zeros(0))
    nll = torch.ones(3, requires_grad=True)
    total, count = span_sums(nll, nothing)
    assert (float(total.detach()), float(count)) == (0.0, 0.0)
    assert not torch.autograd.grad(total, nll)[0].any()
    check_spans(nothing, torch.zeros(3, dtype=torch.int64))
    empty = torch.zeros(0, dtype=torch.int64)
    check_spans(Spans(empty, torch.zeros(0), torch.zeros(0)), empty)


def test_half_precision_is_computed_in_float32():
    nll = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    found = span_loss(nll, singles(torch.tensor([-1.5, -1.0], dtype=torch.float16)))
    assert found.dtype == torch.float32
    assert torch.autograd.grad(found.sum(), nll)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("owner", "weights", "labels", "said"),
    [
        ([0, 0], [1.0, 0.0], [1, 1, 1], "expected an owner for each of 3 positions"),
        ([0, 0, 1], [1.0], [1, 1, 1], "a weight for each of 2 spans, found 3 and 1"),
        ([0, 2, 1], [1.0, 1.0], [1, 1, 1], "expected owners from -1 to 1, found 2"),
        ([0, -2, 1], [1.0, 1.0], [1, 1, 1], "expected owners from -1 to 1, found -2"),
        ([0, 0, 0], [1.0, 1.0], [1, 1, 1], "span 1 has a weight above 0, and only 0 of its 0 positions"),
        (
            [0, 1, 1],
            [1.0, 1.0],
            [1, 1, -100],
            "span 1 has a weight above 0, and only 1 of its 2 positions have a hard label",
        ),
    ],
)
def test_spans_that_do_not_fit_are_refused(owner, weights, labels, said):
    spans = Spans(torch.tensor(owner), torch.zeros(2), torch.tensor(weights))
    with pytest.raises(TrainingError, match=said):
        check_spans(spans, torch.tensor(labels))


def test_a_span_that_does_not_count_may_lack_labels():
    check_spans(Spans(torch.tensor([0, 1, 1]), torch.zeros(2), torch.tensor([1.0, 0.0])), torch.tensor([1, -100, -100]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"span_weight": -1.0}, "--span-weight: expected at least 0"),
        ({"span_temperature": 2.0}, "--span-temperature goes with a --span-weight"),
        ({"span_weight": 1.0, "span_temperature": 0.0}, "--span-temperature: expected above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(MisuseError, match=said):
        Loss(**settings)
    assert Loss(0.0, 0.0, span_weight=1.0).span_temperature is None  # a loss over spans alone is valid
