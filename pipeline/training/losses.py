"""Hard and soft losses, dense: the reference that faster ones are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import ContractError, TrainingError
from pipeline.records import NO_LABEL, Loss, LossTerms, Target


def distillation_loss(
    student_logits: Tensor,
    target: Target,
    *,
    labels: Tensor | None = None,
    loss: Loss,
    temperature: float | None = None,
    weights: Tensor | None = None,
    num_hard: Tensor | float | None = None,
    num_soft: Tensor | float | None = None,
) -> LossTerms:
    """hard_weight * mean CE(labels) + soft_weight * T^2 * mean KL(teacher_T || student_T)   (Hinton, Vinyals and Dean, 2015).

    T^2 undoes the 1/T^2 by which softening shrinks the gradient, so that the two terms stay in proportion when T changes.

    Args:
        student_logits: (N, V') float with V' >= V; columns beyond V (padded vocabularies) are cut off.
        target: the teacher at `temperature`, N positions over V classes.
        labels: (N,) int64, -100 where there is none.
        temperature: at which `target` was made; default `loss.temperature`, or 1.
        weights: (N,) float, how much each position counts. Default 1.
        num_hard: what the hard sum is divided by; default: the labelled positions here. With several ranks or accumulated batches, the
            count over all of them.
        num_soft: the same for the soft sum; default: the sum of `weights`.

    Returns:
        The loss to minimise and its parts.

    Raises:
        ContractError: fewer student classes than the target has.
        TrainingError: a label outside [0, V).
    """
    if student_logits.shape[-1] < target.num_classes:
        raise ContractError(f"the student has {student_logits.shape[-1]} classes, the cache {target.num_classes}")
    temperature = temperature or loss.temperature or 1.0
    logits = (
        student_logits[..., : target.num_classes].float()
        if student_logits.dtype != torch.float64
        else student_logits[..., : target.num_classes]
    )
    weights = (
        torch.ones(len(target), dtype=logits.dtype, device=logits.device)
        if weights is None
        else weights.to(logits.dtype)
    )
    zero = logits[:0].sum()  # keeps the graph when a term has no position
    hard_sum, hard_count = zero, zero.detach()
    if labels is not None:
        check_labels(labels, target.num_classes)
        known = (labels != NO_LABEL) & (weights > 0)
        hard_count = known.sum()
        if loss.hard_weight and bool(known.any()):
            hard_sum = torch.nn.functional.cross_entropy(logits[known], labels[known], reduction="sum")
    soft_sum = zero
    if loss.soft_weight:
        soft_sum = (weights * forward_kl(logits, target, temperature=temperature)).sum() * temperature**2
    soft_count = weights.sum().detach()
    total = loss.hard_weight * _mean(hard_sum, hard_count if num_hard is None else num_hard)
    total = total + loss.soft_weight * _mean(soft_sum, soft_count if num_soft is None else num_soft)
    return LossTerms(total, hard_sum.detach(), soft_sum.detach(), hard_count, soft_count)


def forward_kl(logits: Tensor, target: Target, *, temperature: float) -> Tensor:
    """KL(target || softmax(logits / T)) of each position, over the kept classes and one bucket for the rest.

    Args:
        logits: (N, V) float.

    Returns:
        (N,) nats, not scaled by T^2.

    The student's normaliser is the log-sum-exp over all V, and its mass outside the kept classes a log-sum-exp over what is outside: log(1 - sum) in
    float32 gives infinite losses where the student is nearly sure.
    """
    scaled = logits / temperature
    owner = torch.repeat_interleave(torch.arange(len(target), device=logits.device), target.offsets.diff())
    normaliser = torch.logsumexp(scaled, -1)  # (N,)
    logprobs = scaled[owner, target.ids] - normaliser[owner]  # (sum K,)
    weights = target.weights.to(logits.dtype)
    divergence = target.negative_entropy.to(logits.dtype).index_add(0, owner, -weights * logprobs)
    if target.log_residual is None:
        return divergence
    rest = target.log_residual.to(logits.dtype).exp()
    some = (rest > 0).nonzero().squeeze(-1)  # where nothing is outside, the log-sum-exp over nothing has no gradient
    outside = scaled.masked_fill(_kept(target, owner, scaled.shape), -torch.inf)[some]
    log_outside = torch.logsumexp(outside, -1) - normaliser[some]
    return divergence.index_add(0, some, -rest[some] * log_outside)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse hard labels that are no class.

    Raises:
        TrainingError: names the first one.
    """
    wrong = (labels != NO_LABEL) & ((labels < 0) | (labels >= num_classes))
    if bool(wrong.any()):
        raise TrainingError(
            f"hard label: expected 0 to {num_classes - 1} (or {NO_LABEL} for none), found {int(labels[wrong][0])}"
        )


def _kept(target: Target, owner: Tensor, shape: torch.Size) -> Tensor:
    kept = torch.zeros(shape, dtype=torch.bool, device=owner.device)
    kept[owner, target.ids] = True
    return kept


def _mean(total: Tensor, count: Tensor | float) -> Tensor:
    """A term without a position drops out."""
    return total / count if count else total * 0.0
