"""Dense hard and soft losses; the fused losses are tested against them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.errors import ContractError
from pipeline.records import NO_LABEL, Loss, LossTerms, Spans, Target
from pipeline.training.divergences import divergence, forward_kl, scale_of
from pipeline.training.scores import score_divergence
from pipeline.training.spans import check_spans, owned, span_sums, span_temperature
from pipeline.training.spans.nll import check_labels

__all__ = ["add_spans", "check_labels", "distance", "distillation_loss", "forward_kl"]


def distillation_loss(
    student_logits: Tensor,
    target: Target,
    *,
    labels: Tensor | None = None,
    loss: Loss,
    loss_weights: tuple[float, float] | None = None,
    temperature: float | None = None,
    weights: Tensor | None = None,
    soft_weights: Tensor | None = None,
    num_hard: Tensor | float | None = None,
    num_soft: Tensor | float | None = None,
    spans: Spans | None = None,
    num_spans: Tensor | float | None = None,
) -> LossTerms:
    """Return the weighted sum of cross-entropy with labels and divergence from the teacher.

        hard_weight * mean CE(labels) + soft_weight * T^2 * mean D(teacher_T, student_T)

    (Hinton, Vinyals and Dean, 2015.) T^2 compensates for the factor 1/T^2 in the soft term's
    gradient, so that the two terms keep their proportion when T changes; see `divergences` for the
    factor of each divergence.

    Args:
        student_logits: (N, V') float with V' >= V; columns beyond V (padded vocabularies) are
            ignored.
        target: the teacher at `temperature`, N positions over V classes.
        labels: (N,) int64, -100 where there is none.
        loss_weights: hard and soft weight at this step of a schedule; default: those of `loss`.
        temperature: the temperature of `target`; default `loss.temperature`, or 1.
        weights: (N,) float weight of each position; a position with weight 0 has no hard term
            either. Default 1.
        soft_weights: (N,) float weights of the soft term; default `weights`.
        num_hard: divisor of the hard sum; default: the number of labelled positions here. With
            several ranks or accumulated batches, pass the count over all of them.
        num_soft: divisor of the soft sum; default: the sum of `soft_weights`.
        spans: aligned spans over the N positions, which add `span_weight` times their mean loss
            (see `training.spans`). None: no such term.
        num_spans: divisor of the sum over spans; default: the sum of their weights here.

    Returns:
        The loss to minimise and its parts.

    Raises:
        ContractError: the student has fewer classes than the target.
        TrainingError: a label outside [0, V), or spans that do not fit the positions.
    """
    if student_logits.shape[-1] < target.num_classes:
        raise ContractError(f"the student has {student_logits.shape[-1]} classes, the cache {target.num_classes}")
    temperature = temperature or loss.temperature or 1.0
    logits = student_logits[..., : target.num_classes]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    weights = logits.new_ones(len(target)) if weights is None else weights.to(logits.dtype)
    soft_weights = weights if soft_weights is None else soft_weights.to(logits.dtype)
    loss_weights = loss_weights or (loss.hard_weight, loss.soft_weight)
    zero = logits[:0].sum()  # keeps the autograd graph if a term has no position
    hard_sum, hard_count = zero, zero.detach()
    counted = torch.full((len(target),), NO_LABEL, device=logits.device)
    if labels is not None:
        check_labels(labels, target.num_classes)
        known = (labels != NO_LABEL) & (weights > 0)
        hard_count = known.sum()
        counted = labels.masked_fill(~known, NO_LABEL)
        if loss_weights[0] and bool(known.any()):
            hard_sum = torch.nn.functional.cross_entropy(logits[known], labels[known], reduction="sum")
    soft_sum = zero
    if loss_weights[1]:
        each = divergence(logits, target, kind=loss.divergence, temperature=temperature, mixture=loss.mixture)
        soft_sum = (soft_weights * each).sum() * scale_of(loss.divergence, temperature)
    soft_count = soft_weights.sum().detach()
    total = loss_weights[0] * _mean(hard_sum, hard_count if num_hard is None else num_hard)
    total = total + loss_weights[1] * _mean(soft_sum, soft_count if num_soft is None else num_soft)
    none = zero.detach()
    terms = LossTerms(total, hard_sum.detach(), soft_sum.detach(), hard_count, soft_count, none, none)
    if spans is None or not loss.span_weight:
        return terms

    def nll(positions: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits[positions], counted[positions], reduction="none")

    return add_spans(terms, nll, spans, counted, loss=loss, num_spans=num_spans)


def distance(student_logits: Tensor, target: Target, *, temperature: float) -> Tensor:
    """Return the distance between student and teacher at each position that evaluations report.

    Args:
        student_logits: (N, V) float.

    Returns:
        (N,) float: the forward KL; with scores, the squared difference in units of the target.
    """
    if target.unit is not None:
        return score_divergence(student_logits[:, 0], target)
    return forward_kl(student_logits, target, temperature=temperature)


def add_spans(
    terms: LossTerms,
    nll: Callable[[Tensor], Tensor],
    spans: Spans,
    labels: Tensor,
    *,
    loss: Loss,
    num_spans: Tensor | float | None,
) -> LossTerms:
    """Add `span_weight` times the mean loss over aligned spans to the total.

    Args:
        nll: maps (M,) position indices to their (M,) negative log-likelihoods, with gradients. It
            is called with the positions inside spans only.
        labels: (N,) int64, -100 where there is none or it has weight 0.
        num_spans: as in `distillation_loss`.
    """
    check_spans(spans, labels)
    positions, part = owned(spans)
    total, count = span_sums(nll(positions), part, temperature=span_temperature(loss))
    return replace(
        terms,
        total=terms.total + loss.span_weight * _mean(total, count if num_spans is None else num_spans),
        span_sum=total.detach(),
        num_spans=count,
    )


def _mean(total: Tensor, count: Tensor | float) -> Tensor:
    """Divide a sum by its count; 0, with a gradient, for a count of 0."""
    return total / count if count else total * 0.0
