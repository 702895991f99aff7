"""Approximate likelihood matching: the student's probability of a stretch of text against the teacher's, whatever the tokens of each.

With p the probability that a model gives the text of a span, given what stands before it, and tau a
temperature:

    L(span) = tau * KL((q_T, 1 - q_T) || (q_S, 1 - q_S)),   q = p^(1 / tau)

This is the binarised KL divergence of Minixhofer, Vulic and Ponti, "Universal Cross-Tokenizer
Distillation via Approximate Likelihood Matching", 2025 (arXiv 2503.20083): the span against
everything else. Their code (`tokenkit`, alm_diff_fn = "binary_ce", binarization_temp = 100) takes
the cross-entropy, which differs from it by what does not depend on the student, at tau = 100.

The factor tau is ours. It undoes by how much the power 1 / tau shrinks the gradient, so that the
term keeps its proportion to the cross-entropy when tau changes, as the factors of `divergences` do:
with the surprisals x = -log p in nats,

    dL / dx_S = (q_T - q_S) / (1 - q_S)   ->   1 - x_T / x_S    as tau grows,

which is the gradient of the cross-entropy, 1, less a share that makes it vanish where the student
is as sure of the text as the teacher. At tau = 1 a span that both find unlikely has next to no
gradient: (p_T - p_S) / (1 - p_S). That is why a large tau is the default.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.errors import TrainingError
from pipeline.records import NO_LABEL, Loss, Spans

#: tau, as in the code of the paper's authors.
SPAN_TEMPERATURE = 100.0
#: The least surprisal of a span, nats: float32 knows no probability between 1 - 2^-24 and 1. It
#: keeps the divergence finite where a student rounds to 1.
_LEAST_NATS = 2.0**-24


def span_temperature(loss: Loss) -> float:
    """The tau of a loss."""
    return loss.span_temperature or SPAN_TEMPERATURE


def span_loss(nll: Tensor, spans: Spans, *, temperature: float = SPAN_TEMPERATURE) -> Tensor:
    """The binary KL between the probabilities of each span, times tau; see the top of this module.

    Args:
        nll: (N,) float, nats: the student's negative log-likelihood of each position's hard label.
        temperature: tau, above 0.

    Returns:
        (S,) float, at least 0, not weighted; 0, and no gradient, for spans of weight 0. Computed in
            float32, or in float64 where `nll` is in it. It is 0
        where both are equally likely, and infinite where the student gives a text no probability
            and the teacher does.
    """
    nll = nll if nll.dtype == torch.float64 else nll.float()
    inside = spans.owner >= 0
    surprisal = nll.new_zeros(len(spans)).index_add(0, spans.owner[inside], nll[inside])  # (S,)
    counted = spans.weights > 0
    teacher = -spans.teacher_logprobs.to(nll.dtype)
    found: Tensor = _BinaryKL.apply(surprisal, teacher, counted, temperature)  # type: ignore[no-untyped-call]
    return found


def span_sums(nll: Tensor, spans: Spans, *, temperature: float = SPAN_TEMPERATURE) -> tuple[Tensor, Tensor]:
    """() sum of `weights` times `span_loss`, with its gradient, and () sum of the weights."""
    each = span_loss(nll, spans, temperature=temperature)
    weights = spans.weights.to(each.dtype)
    return (weights * each).sum(), weights.sum()


def owned(spans: Spans) -> tuple[Tensor, Spans]:
    """(M,) int64 numbers of the positions that are in a span, and the same spans over those positions alone."""
    positions = (spans.owner >= 0).nonzero().squeeze(-1)
    return positions, dataclasses.replace(spans, owner=spans.owner[positions])


def check_spans(spans: Spans, labels: Tensor) -> None:
    """Refuse spans whose likelihood cannot be taken from these positions.

    Args:
        labels: (N,) int64 hard labels, -100 where none counts.

    Raises:
        TrainingError: other shapes, an owner that is no span, a span that counts and has no
            position or one without a hard label.
    """
    count = len(spans)
    if spans.owner.shape != labels.shape or spans.weights.shape != spans.teacher_logprobs.shape:
        raise TrainingError(
            f"aligned spans: expected an owner for each of {labels.numel()} positions and a weight for each of {count} spans, "
            f"found {spans.owner.numel()} and {spans.weights.numel()}"
        )
    if bool(((spans.owner < -1) | (spans.owner >= count)).any()):
        raise TrainingError(
            f"aligned spans: expected owners from -1 to {count - 1}, found {_extreme(spans.owner, count)}"
        )
    inside = spans.owner >= 0
    none = spans.owner.new_zeros(count)
    lengths = none.index_add(0, spans.owner[inside], torch.ones_like(spans.owner[inside]))
    known = none.index_add(0, spans.owner[inside], (labels[inside] != NO_LABEL).long())
    wrong = (spans.weights > 0) & ((lengths == 0) | (known < lengths))
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise TrainingError(
            f"aligned spans: span {first} counts, and {int(known[first])} of its {int(lengths[first])} positions have a hard label; "
            "its weight must be 0, or its owner complete"
        )


def _extreme(owner: Tensor, count: int) -> int:
    lowest, highest = int(owner.min()), int(owner.max())
    return lowest if lowest < -1 else max(highest, count)


class _BinaryKL(torch.autograd.Function):
    """(student's, teacher's surprisal), (S,) each -> (S,) tau * KL; only the first has a gradient.

    Written out, since autograd's is inf - inf at p = 1.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
        most = torch.finfo(
            student.dtype
        ).max  # stands for a surprisal without end: exp(-most) is 0, and inf - most is inf
        ours = student.clamp_min(_LEAST_NATS) / temperature
        theirs = (teacher.clamp_min(_LEAST_NATS) / temperature).clamp_max(most)
        q = torch.exp(-theirs)
        one = torch.where(q > 0, q * (ours - theirs), 0.0)
        other = -torch.expm1(-theirs) * _log_ratio_of_rest(theirs, ours)
        ctx.save_for_backward(torch.where(counted, _slope(ours, theirs), 0.0))
        return torch.where(counted, temperature * (one + other), 0.0).clamp_min(0.0)  # rounding may give -1e-9

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return outer * slope, None, None, None


def _log_ratio_of_rest(theirs: Tensor, ours: Tensor) -> Tensor:
    """log((1 - exp(-theirs)) / (1 - exp(-ours))), exactly 0 at equality.

    log(1 - e^-u) is log(-expm1(-u)) below log 2 and log1p(-exp(-u)) above (Maechler, 2012); where
    both are below, one logarithm of the ratio loses less.
    """
    small = torch.log(torch.expm1(-theirs) / torch.expm1(-ours))
    return torch.where(torch.maximum(theirs, ours) < math.log(2), small, _log1mexp(theirs) - _log1mexp(ours))


def _log1mexp(u: Tensor) -> Tensor:
    """log(1 - exp(-u)) for u > 0."""
    return torch.where(u < math.log(2), torch.log(-torch.expm1(-u)), torch.log1p(-torch.exp(-u)))


def _slope(ours: Tensor, theirs: Tensor) -> Tensor:
    """(q_T - q_S) / (1 - q_S): the difference from the larger of both, so that nothing cancels or overflows."""
    apart = ours - theirs
    larger = torch.exp(-torch.minimum(ours, theirs))
    return torch.sign(apart) * larger * -torch.expm1(-apart.abs()) / -torch.expm1(-ours)
