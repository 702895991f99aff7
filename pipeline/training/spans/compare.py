"""Approximate likelihood matching: compare the probabilities of spans across tokenizers.

With p the probability that a model gives the text of a span, given the text before it, and tau a
temperature:

    L(span) = tau * KL((q_T, 1 - q_T) || (q_S, 1 - q_S)),   q = p^(1 / tau)

This is the binarised KL divergence of Minixhofer, Vulic and Ponti, "Universal Cross-Tokenizer
Distillation via Approximate Likelihood Matching", 2025 (arXiv 2503.20083): the span against
everything else. Their code (`tokenkit`, alm_diff_fn = "binary_ce", binarization_temp = 100) uses
the cross-entropy at tau = 100, which differs from the KL by a term that does not depend on the
student.

The factor tau is not in the paper. It compensates for the smaller gradient due to the power 1 /
tau, so that the term keeps its proportion to the cross-entropy when tau changes, like the factors
of `divergences`. With the surprisals x = -log p in nats,

    dL / dx_S = (q_T - q_S) / (1 - q_S)   ->   1 - x_T / x_S    as tau grows,

which is the gradient of the cross-entropy, 1, minus a share that makes it vanish where the student
gives the text the same probability as the teacher. At tau = 1 a span that both find unlikely has
almost no gradient, (p_T - p_S) / (1 - p_S). That is why the default tau is large.
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

#: Default tau, as in the code of the paper's authors.
SPAN_TEMPERATURE = 100.0
#: Smallest surprisal of a span, in nats: float32 has no number between 1 - 2^-24 and 1. It keeps
#: the divergence finite where the student's probability rounds to 1.
_LEAST_NATS = 2.0**-24


def span_temperature(loss: Loss) -> float:
    """Return the tau of a loss."""
    return loss.span_temperature or SPAN_TEMPERATURE


def span_loss(nll: Tensor, spans: Spans, *, temperature: float = SPAN_TEMPERATURE) -> Tensor:
    """Return the binary KL of each span, times tau; see the top of this module.

    Args:
        nll: (N,) float, nats: the student's negative log-likelihood of each position's hard label.
        temperature: tau, above 0.

    Returns:
        (S,) float, at least 0, not weighted; 0 without a gradient for spans of weight 0. Computed
        in float64 if `nll` is float64, else in float32. It is 0 where both probabilities are equal,
        and infinite where the student's is 0 and the teacher's is not.
    """
    nll = nll if nll.dtype == torch.float64 else nll.float()
    inside = spans.owner >= 0
    surprisal = nll.new_zeros(len(spans)).index_add(0, spans.owner[inside], nll[inside])  # (S,)
    counted = spans.weights > 0
    teacher = -spans.teacher_logprobs.to(nll.dtype)
    found: Tensor = _BinaryKL.apply(surprisal, teacher, counted, temperature)  # type: ignore[no-untyped-call]
    return found


def span_sums(nll: Tensor, spans: Spans, *, temperature: float = SPAN_TEMPERATURE) -> tuple[Tensor, Tensor]:
    """Return the sum of `weights` times `span_loss`, with its gradient, and the sum of weights."""
    each = span_loss(nll, spans, temperature=temperature)
    weights = spans.weights.to(each.dtype)
    return (weights * each).sum(), weights.sum()


def owned(spans: Spans) -> tuple[Tensor, Spans]:
    """Return (M,) int64 indices of the positions in spans, and the spans over those positions."""
    positions = (spans.owner >= 0).nonzero().squeeze(-1)
    return positions, dataclasses.replace(spans, owner=spans.owner[positions])


def check_spans(spans: Spans, labels: Tensor) -> None:
    """Refuse spans whose likelihood cannot be computed from these positions.

    Args:
        labels: (N,) int64 hard labels, -100 where there is none or it has weight 0.

    Raises:
        TrainingError: shapes differ; an owner is not the index of a span; or a span with a weight
            has no position, or one without a hard label.
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
            f"aligned spans: span {first} has a weight above 0, and only {int(known[first])} of its {int(lengths[first])} positions have a hard label; "
            "its weight must be 0, or its owner complete"
        )


def _extreme(owner: Tensor, count: int) -> int:
    lowest, highest = int(owner.min()), int(owner.max())
    return lowest if lowest < -1 else max(highest, count)


class _BinaryKL(torch.autograd.Function):
    """(S,) surprisals of student and teacher -> (S,) tau * KL; only the first has a gradient.

    The gradient is explicit, since that of autograd is inf - inf at p = 1.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
        # Replaces an infinite surprisal: exp(-most) is 0, and inf - most is inf.
        most = torch.finfo(student.dtype).max
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
    """Return log((1 - exp(-theirs)) / (1 - exp(-ours))), exactly 0 at equality.

    log(1 - e^-u) is log(-expm1(-u)) for u below log 2 and log1p(-exp(-u)) above (Maechler, 2012).
    Where both are below, a single logarithm of the ratio is more accurate.
    """
    small = torch.log(torch.expm1(-theirs) / torch.expm1(-ours))
    return torch.where(torch.maximum(theirs, ours) < math.log(2), small, _log1mexp(theirs) - _log1mexp(ours))


def _log1mexp(u: Tensor) -> Tensor:
    """Return log(1 - exp(-u)) for u > 0."""
    return torch.where(u < math.log(2), torch.log(-torch.expm1(-u)), torch.log1p(-torch.exp(-u)))


def _slope(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return (q_T - q_S) / (1 - q_S), without cancellation or overflow.

    The difference is computed as the larger of q_T and q_S times a factor.
    """
    apart = ours - theirs
    larger = torch.exp(-torch.minimum(ours, theirs))
    return torch.sign(apart) * larger * -torch.expm1(-apart.abs()) / -torch.expm1(-ours)
