"""Hard and soft loss from hidden states and output matrix, without the (N, V) logits in memory.

Positions are processed in chunks. For each chunk the logits, both losses and their gradient with
respect to the logits are computed, and from that the chunk's part of the gradients of hidden states
and output matrix. This happens in the forward pass, while the chunk's logits are in memory; the
backward pass only scales the gradients, as in Liger-Kernel (Hsu et al., 2024). The cost is a
float32 gradient of the output matrix; the benefit is that the memory of a step does not grow with N
x V.

Cross-entropy and forward KL have explicit gradients (`_linear_terms`): at T = 1, one softmax over V
serves both. The other divergences apply autograd to the dense formulas of each chunk, so that each
divergence is defined in one place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.records import NO_LABEL, Loss, LossTerms, Spans, Target
from pipeline.training.divergences import divergence, owners, scale_of
from pipeline.training.losses import add_spans, check_labels
from pipeline.training.spans import fused_nll
from pipeline.training.spans.head import Head, matmul_dtype
from pipeline.training.spans.head import chunk_positions as default_positions

__all__ = ["Head", "Scores", "fused_loss", "fused_scores", "scores_of"]


@dataclass(frozen=True, slots=True)
class Scores:
    """The student's prediction at each position, (N,) each.

    With classes: the argmax, its probability, the negative log-likelihood of the label and the
    divergence from the teacher. With scores: the score, nan, the squared error and the divergence.
    """

    predicted: Tensor
    confidence: Tensor
    nll: Tensor
    """nats; with scores the squared error. nan where there is no label."""
    divergence: Tensor
    """nats, not scaled by T^2."""


def fused_loss(
    hidden: Tensor,
    head: Head,
    target: Target,
    *,
    labels: Tensor,
    loss: Loss,
    temperature: float,
    weights: Tensor,
    soft_weights: Tensor,
    loss_weights: tuple[float, float] | None = None,
    num_hard: Tensor | float | None = None,
    num_soft: Tensor | float | None = None,
    spans: Spans | None = None,
    num_spans: Tensor | float | None = None,
    chunk_positions: int | None = None,
) -> LossTerms:
    """Return `distillation_loss(head.logits(hidden), ...)` and its gradient without all logits.

    Args:
        hidden: (N, H) float: the inputs of the output matrix at the supervised positions.
        chunk_positions: positions per chunk. Default: 32 MB of logits on a CPU, 256 MB on a GPU.

    The other arguments are those of `distillation_loss`.

    Raises:
        TrainingError: a label outside [0, V), or spans that do not fit the positions.
    """
    check_labels(labels, target.num_classes)
    hard, soft = loss_weights or (loss.hard_weight, loss.soft_weight)
    known = (labels != NO_LABEL) & (weights > 0)
    hard_count, soft_count = known.sum(), soft_weights.sum()
    hard_divisor = float(hard_count if num_hard is None else num_hard)
    soft_divisor = float(soft_count if num_soft is None else num_soft)
    job = _Job(
        head=head,
        target=target,
        labels=labels.masked_fill(~known, NO_LABEL),
        soft_weights=soft_weights * scale_of(loss.divergence, temperature),
        hard_factor=hard / hard_divisor if hard_divisor else 0.0,
        soft_factor=soft / soft_divisor if soft_divisor else 0.0,
        loss=loss,
        temperature=temperature,
        chunk=chunk_positions or default_positions(target.num_classes, hidden.device.type),
        dtype=matmul_dtype(hidden),
        needs_grad=torch.is_grad_enabled(),
    )
    total, hard_sum, soft_sum = _FusedLoss.apply(hidden, head.weight, head.bias, job)  # type: ignore[no-untyped-call]
    terms = LossTerms(
        total, hard_sum, soft_sum, hard_count, soft_count, torch.zeros_like(hard_sum), torch.zeros_like(hard_sum)
    )
    if spans is None or not loss.span_weight:
        return terms

    def nll(positions: Tensor) -> Tensor:
        return fused_nll(
            hidden[positions],
            head,
            job.labels[positions],
            num_classes=target.num_classes,
            chunk_positions=chunk_positions,
        )

    return add_spans(terms, nll, spans, job.labels, loss=loss, num_spans=num_spans)


@torch.no_grad()
def fused_scores(
    hidden: Tensor, head: Head, target: Target, *, labels: Tensor, loss: Loss, temperature: float
) -> Scores:
    """Return predictions at the supervised positions, chunk by chunk; arguments as `fused_loss`."""
    parts = []
    step = default_positions(target.num_classes, hidden.device.type)
    for start in range(0, len(target), step):
        part = _slice(target, start, start + step)
        logits = head.logits(hidden[start : start + step])[:, : target.num_classes].float()
        parts.append(scores_of(logits, part, labels[start : start + step], loss=loss, temperature=temperature))
    if not parts:
        return scores_of(hidden.new_zeros(0, target.num_classes), target, labels, loss=loss, temperature=temperature)
    return Scores(*(torch.cat([getattr(part, name) for part in parts]) for name in Scores.__slots__))


def scores_of(logits: Tensor, target: Target, labels: Tensor, *, loss: Loss, temperature: float) -> Scores:
    """Return predictions and divergences from (N, V) logits; arguments as `fused_loss`."""
    logprobs = torch.log_softmax(logits.float(), -1)
    best, predicted = logprobs.max(-1)
    nll = -logprobs.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    each = divergence(logits, target, kind=loss.divergence, temperature=temperature, mixture=loss.mixture)
    return Scores(predicted, best.exp(), nll.masked_fill(labels == NO_LABEL, torch.nan), each)


@dataclass(frozen=True, slots=True)
class _Job:
    """The inputs of the fused pass that have no gradient."""

    head: Head
    target: Target
    labels: Tensor
    """(N,) int64, -100 where there is no hard label or it has weight 0."""
    soft_weights: Tensor
    """(N,) float, multiplied by the divergence's power of T."""
    hard_factor: float
    """Weight of the hard term divided by its count."""
    soft_factor: float
    loss: Loss
    temperature: float
    chunk: int
    dtype: torch.dtype
    needs_grad: bool


class _FusedLoss(torch.autograd.Function):
    """(hidden, weight, bias) -> (total, hard sum, soft sum); only the total has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Gradients are always off here, and `needs_input_grad` does not show whether the caller had
        # them on: that is `job.needs_grad`.
        needs_hidden, needs_weight, needs_bias = (needed and job.needs_grad for needed in ctx.needs_input_grad[:3])
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        num_classes = job.target.num_classes
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight[:num_classes].to(job.dtype)  # (V, H): without the rows of a padded vocabulary
            offset = None if bias is None else bias[:num_classes].to(job.dtype)
            grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
            grad_weight = torch.zeros(weight.shape, dtype=accumulate, device=weight.device) if needs_weight else None
            grad_bias = (
                torch.zeros(bias.shape, dtype=accumulate, device=bias.device)
                if bias is not None and needs_bias
                else None
            )
            hard_sum = torch.zeros((), dtype=accumulate, device=hidden.device)
            soft_sum = torch.zeros_like(hard_sum)
            count = (
                len(job.target) if job.hard_factor or job.soft_factor else 0
            )  # neither: only aligned spans are trained on
            for start in range(0, count, job.chunk):
                stop = min(start + job.chunk, count)
                inputs = hidden[start:stop].to(job.dtype)
                raw = torch.nn.functional.linear(inputs, matrix, offset).to(accumulate)  # (C, V)
                hard, soft, grad = _chunk(raw, job, start, stop, needs_grad=needs_hidden or needs_weight or needs_bias)
                hard_sum += hard
                soft_sum += soft
                if grad is None:
                    continue
                if grad_bias is not None:
                    grad_bias[:num_classes] += grad.sum(0)
                narrow = grad.to(job.dtype)
                if grad_hidden is not None:
                    grad_hidden[start:stop] = narrow @ matrix
                if grad_weight is not None:
                    if job.dtype == accumulate:
                        grad_weight[:num_classes].addmm_(narrow.t(), inputs)
                    else:
                        grad_weight[:num_classes] += narrow.t() @ inputs
        ctx.grads = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if bias is None or grad_bias is None else grad_bias.to(bias.dtype),
        )
        total = job.hard_factor * hard_sum + job.soft_factor * soft_sum
        ctx.mark_non_differentiable(hard_sum, soft_sum)
        return total, hard_sum, soft_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        scaled = [None if grad is None else grad.mul_(scale.to(grad.dtype)) for grad in ctx.grads]
        ctx.grads = None  # scaled in place: valid for one backward pass only
        return (*scaled, None)


def _chunk(raw: Tensor, job: _Job, start: int, stop: int, *, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the hard and soft sum of one chunk, and the gradient of the total.

    The gradient is with respect to `raw`, the output of the matrix. `raw` is overwritten.
    """
    head = job.head
    logits = head.transform(raw)
    slope = None
    if needs_grad and head.cap != math.inf:
        slope = (1 - (logits / head.cap).square()) * head.scale
    part = _slice(job.target, start, stop)
    labels = job.labels[start:stop]
    soft_weights = job.soft_weights[start:stop].to(raw.dtype)
    if job.soft_factor and (job.loss.divergence != "forward-kl" or part.ids.numel() == logits.numel()):
        hard, soft, grad = _autograd_terms(logits, part, labels, soft_weights, job, needs_grad=needs_grad)
    else:
        hard, soft, grad = _linear_terms(logits, part, labels, soft_weights, job)
    if not needs_grad:
        return hard, soft, None
    if slope is not None:
        grad.mul_(slope)
    elif head.scale != 1.0:
        grad.mul_(head.scale)
    return hard, soft, grad


def _autograd_terms(
    logits: Tensor, target: Target, labels: Tensor, soft_weights: Tensor, job: _Job, *, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply autograd to the dense formulas of one chunk."""
    leaf = logits.detach().requires_grad_(needs_grad)
    with torch.set_grad_enabled(needs_grad):
        hard = torch.nn.functional.cross_entropy(leaf, labels, ignore_index=NO_LABEL, reduction="sum")
        each = divergence(leaf, target, kind=job.loss.divergence, temperature=job.temperature, mixture=job.loss.mixture)
        soft = (soft_weights * each).sum()
        total = job.hard_factor * hard + job.soft_factor * soft
    grad = torch.autograd.grad(total, leaf)[0] if needs_grad else logits
    return hard.detach(), soft.detach(), grad


def _linear_terms(
    logits: Tensor, target: Target, labels: Tensor, soft_weights: Tensor, job: _Job
) -> tuple[Tensor, Tensor, Tensor]:
    """Return cross-entropy and forward KL with explicit gradients, which overwrite `logits`.

    With s = logits / T, w the target's weights, r the target's mass outside the kept classes, M =
    sum w + r, and O the classes that are not kept:

        KL   = sum q log q - sum_kept w_i s_i - r logsumexp_O(s) + M logsumexp(s)
        dKL/ds_i = M p_i - w_i                       for a kept class
                 = M p_i - r softmax_O(s)_i          outside
    """
    zero = torch.zeros((), dtype=logits.dtype, device=logits.device)
    position = (labels != NO_LABEL).nonzero().squeeze(-1)
    label = labels[position]
    temperature = job.temperature
    hard, extra = zero, None
    if job.hard_factor and temperature != 1.0 and job.soft_factor:  # needs a softmax of its own
        hard, extra = _cross_entropy(logits.clone(), position, label, job.hard_factor)
    elif not job.soft_factor:
        if not job.hard_factor:
            return zero, zero, logits.zero_()
        hard, grad = _cross_entropy(logits, position, label, job.hard_factor)
        return hard, zero, grad
    scaled = logits if temperature == 1.0 else logits.div_(temperature)
    owner = owners(target)
    kept_scaled = scaled[owner, target.ids]  # (sum K,)
    label_scaled = scaled[position, label]
    scaled[owner, target.ids] = -torch.inf
    peak = scaled.amax(-1, keepdim=True)  # over O
    some = (peak > -torch.inf).squeeze(-1)
    outside = torch.softmax(scaled, -1)  # over O
    if not bool(some.all()):
        outside[~some] = 0.0
    log_outside = torch.where(
        some, peak.squeeze(-1) - outside.amax(-1).clamp_min(torch.finfo(outside.dtype).tiny).log(), -torch.inf
    )
    kept_peak = torch.full_like(log_outside, -torch.inf).scatter_reduce(0, owner, kept_scaled, "amax")
    top = torch.maximum(peak.squeeze(-1), kept_peak)
    kept_sum = torch.zeros_like(log_outside).index_add(0, owner, (kept_scaled - top[owner]).exp())
    normaliser = top + (kept_sum + (log_outside - top).exp()).log()  # (C,) log-sum-exp over all V
    weights = target.weights.to(scaled.dtype)
    mass = torch.zeros_like(normaliser).index_add(0, owner, weights)
    each = target.negative_entropy.to(scaled.dtype).index_add(0, owner, -weights * (kept_scaled - normaliser[owner]))
    rest = torch.zeros_like(normaliser)
    if target.log_residual is not None:
        rest = torch.where(some, target.log_residual.to(scaled.dtype).exp(), 0.0)
        each = each - rest * torch.where(rest > 0, log_outside - normaliser, 0.0)
    soft = (soft_weights * each).sum()
    # Gradient: a factor of p per position, minus terms at single classes.
    factor = soft_weights * (job.soft_factor / temperature)  # (C,)
    row = factor * (mass + rest)
    if job.hard_factor and temperature == 1.0:
        hard = (normaliser[position] - label_scaled).sum()
        row = row.index_add(0, position, torch.full_like(label_scaled, job.hard_factor))
    share = (log_outside - normaliser).exp()  # the student's mass over O
    grad = outside.mul_((row * share - factor * rest).unsqueeze(-1))
    grad[owner, target.ids] = row[owner] * (kept_scaled - normaliser[owner]).exp() - factor[owner] * weights
    if job.hard_factor and temperature == 1.0:
        grad[position, label] -= job.hard_factor
    if extra is not None:
        grad += extra
    return hard, soft, grad


def _cross_entropy(logits: Tensor, position: Tensor, label: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of labelled positions, and `factor` times its gradient."""
    peak = logits.amax(-1)
    grad = torch.softmax(logits, -1)
    normaliser = peak - grad.amax(-1).log()
    value = (normaliser[position] - logits[position, label]).sum()
    rows = torch.zeros_like(peak).index_fill(0, position, factor)
    grad.mul_(rows.unsqueeze(-1))
    grad[position, label] -= factor
    return value, grad


def _slice(target: Target, start: int, stop: int) -> Target:
    """Return the target of positions [start, stop)."""
    offsets = target.offsets[start : stop + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    return Target(
        target.num_classes,
        offsets - first,
        target.ids[first:last],
        target.weights[first:last],
        None if target.log_residual is None else target.log_residual[start:stop],
        target.negative_entropy[start:stop],
    )
