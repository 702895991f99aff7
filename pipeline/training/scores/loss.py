"""Hard and soft losses of scores.

Differences are in the unit of an output: the standard deviation of the teacher's scores.

With s of the student, t of the teacher, u the unit and d = (s - t) / u, the divergence at one
position of a group of n rows is

| kind | D | factor | source |
|---|---|---|---|
| mse | d^2 | 1 | Ba and Caruana, 2014 |
| margin-mse | mean over the other rows j of (d - d_j)^2 | 1 | Hofstaetter et al., 2020 |
| listwise-kl | n q log(q / p) | T^2 | Cao et al. (ListNet), 2007 |

where q and p are the softmax over the group of t / (u T) and of s / (u T). Here margin-mse is taken
over all pairs; the factor T^2 is that of Hinton, Vinyals and Dean, 2015.

The last two are means over groups: positions have weight 1 / n, so that the sum over a group is its
mean over pairs, or KL(q, p).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import EncodingError, MisuseError
from pipeline.records import DIVERGENCE_KINDS, Divergence, Loss, LossTerms, Target, is_known

#: The divergences of scores, and those of them that compare the rows of a group.
DIVERGENCES: tuple[Divergence, ...] = ("mse", "margin-mse", "listwise-kl")
BY_GROUP: tuple[Divergence, ...] = ("margin-mse", "listwise-kl")


def check_score_loss(loss: Loss, *, is_score: bool, has_groups: bool, teacher_labels: bool) -> None:
    """Refuse divergences and settings that do not apply to the soft labels.

    Raises:
        EncodingError: a divergence of distributions for scores, or of scores for distributions.
        MisuseError: a divergence of groups without groups, or a setting that would be ignored.
    """
    if is_score != (loss.divergence in DIVERGENCES):
        raise EncodingError(
            f"--divergence {loss.divergence}: compares {'distributions, and the cache holds scores' if is_score else 'scores, and the cache holds distributions'}; "
            + (f"use {', '.join(DIVERGENCES)}" if is_score else "use forward-kl")
        )
    if not is_score:
        return
    if teacher_labels:
        raise MisuseError(
            "--hard-labels teacher: scores have no most likely class to use as the label; leave it out: the soft term learns the teacher's scores"
        )
    if loss.divergence in BY_GROUP and not has_groups:
        raise MisuseError(
            f"--divergence {loss.divergence}: compares the rows of a group, and the cache names no groups; use mse, or cache again with --group-column"
        )
    if loss.temperature not in (None, 1.0) and not DIVERGENCE_KINDS[loss.divergence].power:
        raise MisuseError(
            f"--temperature {loss.temperature:g}: {loss.divergence} has none; leave it out, or use listwise-kl"
        )
    if loss.position_weights != "equal":
        raise MisuseError("--position-weights: weigh by the teacher's entropy, and scores have none; leave it out")
    if loss.tail != "ghost":
        raise MisuseError(
            "--tail-policy: is for soft labels that leave classes out, and scores are whole; leave it out"
        )


def score_loss(
    scores: Tensor,
    target: Target,
    *,
    labels: Tensor,
    loss: Loss,
    weights: Tensor,
    soft_weights: Tensor,
    loss_weights: tuple[float, float] | None = None,
    temperature: float = 1.0,
    num_hard: Tensor | float | None = None,
    num_soft: Tensor | float | None = None,
) -> LossTerms:
    """Return hard_weight * mean ((s - y) / u)^2 + soft_weight * mean D(teacher, student).

    Args:
        scores: (N,) float, of the student.
        target: N scores of the teacher, with their unit.
        labels: (N,) float, nan where there is none.
        weights: (N,) float weight of each position; a position with weight 0 has no hard term.
        soft_weights: (N,) float weights of the soft term.
        loss_weights: hard and soft weight at this step of a schedule; default: those of `loss`.
        temperature: of `listwise-kl`.
        num_hard: divisor of the hard sum; default: the number of labelled positions here.
        num_soft: divisor of the soft sum; default: the sum of `soft_weights`.
    """
    hard_weight, soft_weight = loss_weights or (loss.hard_weight, loss.soft_weight)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    zero = scores[:0].sum()  # keeps the autograd graph if a term has no position
    known = is_known(labels) & (weights > 0)
    hard_sum, soft_sum = zero, zero
    if hard_weight and bool(known.any()):
        hard_sum = ((scores[known] - labels[known].to(scores.dtype)) / _unit(target, scores)[known]).square().sum()
    if soft_weight:
        counted = soft_weights > 0
        each = score_divergence(scores, target, loss.divergence, temperature=temperature)
        factor = float(temperature ** DIVERGENCE_KINDS[loss.divergence].power)
        soft_sum = factor * (soft_weights[counted].to(scores.dtype) * each[counted]).sum()
    hard_count, soft_count = known.sum(), soft_weights.sum().detach()
    total = hard_weight * _mean(hard_sum, hard_count if num_hard is None else num_hard)
    total = total + soft_weight * _mean(soft_sum, soft_count if num_soft is None else num_soft)
    none = zero.detach()
    return LossTerms(total, hard_sum.detach(), soft_sum.detach(), hard_count, soft_count, none, none)


def score_divergence(scores: Tensor, target: Target, kind: Divergence = "mse", *, temperature: float = 1.0) -> Tensor:
    """Return D at each position (see the top of this module), not scaled by a power of T.

    Args:
        scores: (N,) float, of the student.
        target: N scores of the teacher with their unit and, for divergences of groups, their
            groups.

    Returns:
        (N,), nan where a position is alone in its group, unless `kind` is mse.
    """
    unit = _unit(target, scores)
    ours, theirs = scores / unit, target.weights.to(scores.dtype) / unit
    if kind == "mse":
        return (ours - theirs).square()
    assert target.group is not None
    groups, group = torch.unique(target.group, return_inverse=True)
    count = torch.bincount(group, minlength=len(groups)).to(scores.dtype)
    size = count[group]
    alone = size < 2

    def summed(values: Tensor) -> Tensor:
        return torch.zeros(len(groups), dtype=values.dtype, device=values.device).index_add(0, group, values)[group]

    if kind == "margin-mse":
        gap = ours - theirs
        pairs = size * gap.square() - 2 * gap * summed(gap) + summed(gap.square())  # the sum over the others
        return (pairs / (size - 1).clamp_min(1)).masked_fill(alone, torch.nan)

    def log_softmax(values: Tensor) -> Tensor:
        peak = torch.full((len(groups),), -torch.inf, dtype=values.dtype, device=values.device)
        shifted = values - peak.scatter_reduce(0, group, values.detach(), "amax")[group]
        return shifted - summed(shifted.exp()).log()

    log_q, log_p = log_softmax(theirs / temperature), log_softmax(ours / temperature)
    return (size * log_q.exp() * (log_q - log_p)).masked_fill(alone, torch.nan)


def _unit(target: Target, scores: Tensor) -> Tensor:
    return torch.ones_like(scores) if target.unit is None else target.unit.to(scores.dtype)


def _mean(total: Tensor, count: Tensor | float) -> Tensor:
    """Divide a sum by its count; 0, with a gradient, for a count of 0."""
    return total / count if count else total * 0.0
