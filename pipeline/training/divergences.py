"""Divergences between teacher and student at each position: ragged teacher, dense student logits.

A divergence is taken over *buckets*: the kept classes and, where the teacher's mass outside them is
known (ghost), one bucket for all other classes. Over the buckets, with q of the teacher and p of
the student, both at temperature T:

| kind | D(q, p) | factor | source |
|---|---|---|---|
| forward-kl | sum q log(q / p) | T^2 | Hinton, Vinyals and Dean, 2015 |
| reverse-kl | sum p log(p / q) | T^2 | Gu et al. (MiniLLM), 2024 |
| jensen-shannon | b KL(q, m) + (1 - b) KL(p, m) | T^2 | Agarwal et al. (GKD), 2024 |
| skewed-kl | KL(q, a q + (1 - a) p) | T^2 | Ko et al. (DistiLLM), 2024 |
| total-variation | 1/2 sum abs(q - p) | T | Wen et al., 2023 |
| logit-mse | mean over V of (z_S - z_T)^2 | 1 | Ba and Caruana, 2014; Kim et al., 2021 |

where m = b q + (1 - b) p, and z are the logits minus their mean.

The factor compensates for the smaller gradient at a higher temperature, so that the term keeps its
proportion to the cross-entropy when T changes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.errors import EncodingError, MisuseError
from pipeline.records import DIVERGENCE_KINDS, Divergence, Encoding, Full, Loss, Sampled, Target


def check_divergence(encoding: Encoding, loss: Loss, *, is_mapped: bool = False) -> None:
    """Refuse a divergence that cannot be computed from an encoding.

    Args:
        is_mapped: whether the student has another tokenizer, so that the target is over other
            classes than the teacher's.

    Raises:
        EncodingError: a divergence that is not linear in q with encoding `sampled`, or `logit-mse`
            with an encoding that does not keep all logits. The message names the encodings that
            support it.
        MisuseError: a tail policy with which the divergence is undefined.
    """
    kind = loss.divergence
    if isinstance(encoding, Sampled) and kind != "forward-kl":
        raise EncodingError(
            f"--divergence {kind}: is not linear in the teacher's probabilities, so that an unbiased sample of them (encoding sampled) gives a biased value; "
            "use forward-kl, or cache again with --encoding top-k or full"
        )
    if kind == "logit-mse" and not isinstance(encoding, Full):
        raise EncodingError(
            f"--divergence logit-mse: needs the logit of every class, which encoding {encoding.kind} does not keep; cache again with --encoding full, "
            "or use forward-kl with a high --temperature, whose limit it is"
        )
    if kind == "logit-mse" and is_mapped:
        raise EncodingError(
            "--divergence logit-mse: compares the logits of the same classes, and a student with another tokenizer has others; "
            "use forward-kl with a high --temperature, whose limit it is"
        )
    if kind != "forward-kl" and loss.tail != "ghost":
        raise MisuseError(
            f"--tail-policy {loss.tail}: goes with --divergence forward-kl; {kind} compares whole distributions, use ghost"
        )


def scale_of(kind: Divergence, temperature: float) -> float:
    """Return the factor, a power of T, that a divergence is multiplied by."""
    return float(temperature ** DIVERGENCE_KINDS[kind].power)


def divergence(
    logits: Tensor, target: Target, *, kind: Divergence = "forward-kl", temperature: float, mixture: float | None = None
) -> Tensor:
    """Return D(teacher, student) at each position.

    Args:
        logits: (N, V) float, of the student.
        target: the teacher's distribution at `temperature`, over the same V classes.
        mixture: the teacher's share b or a; default 0.5 for jensen-shannon, 0.1 for skewed-kl.

    Returns:
        (N,) nats (total variation: a probability; logit-mse: squared nats), not scaled by a power
        of T.

    The student's normaliser is the log-sum-exp over all V. Its mass outside the kept classes is a
    log-sum-exp over the other classes, since log(1 - sum) in float32 gives infinite losses where
    the student is nearly certain.
    """
    if kind == "forward-kl":
        return forward_kl(logits, target, temperature=temperature)
    if kind == "logit-mse":
        return _logit_mse(logits, target, temperature)
    owner, q, log_p = _buckets(logits / temperature, target)
    terms = _pointwise(kind, q, log_p, DIVERGENCE_KINDS[kind].mixture if mixture is None else mixture)
    return torch.zeros(len(target), dtype=log_p.dtype, device=log_p.device).index_add(0, owner, terms)


def forward_kl(logits: Tensor, target: Target, *, temperature: float) -> Tensor:
    """Return KL(target || softmax(logits / T)) at each position, (N,) nats, not scaled by T^2.

    See `divergence`.
    """
    scaled = logits / temperature
    if _has_every_class_in_order(target, logits):  # no need to gather
        log_p = torch.log_softmax(scaled, -1)
        weights = target.weights.to(log_p.dtype).view_as(log_p)
        return target.negative_entropy.to(log_p.dtype) - (weights * log_p).sum(-1)
    owner, q, log_p = _buckets(scaled, target)
    return target.negative_entropy.to(log_p.dtype).index_add(0, owner, -q * log_p)


def _has_every_class_in_order(target: Target, logits: Tensor) -> bool:
    if target.ids.numel() != logits.numel() or target.log_residual is not None:
        return False
    return bool((target.ids.view_as(logits) == torch.arange(logits.shape[-1], device=target.ids.device)).all())


def owners(target: Target) -> Tensor:
    """Return (sum K,) the position that each kept class belongs to."""
    count = torch.arange(len(target), device=target.offsets.device)
    return torch.repeat_interleave(count, target.offsets.diff(), output_size=target.ids.numel())


def _buckets(scaled: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """Return position, q and log p of each bucket, (sum K + M,) each.

    The kept classes come first, then the buckets of all other classes of the M positions where the
    teacher has mass on them. A position may have no bucket at all: one of a student with another
    tokenizer that is aligned with none of the teacher's.

    Args:
        scaled: (N, V) logits of the student divided by the temperature.
    """
    owner = owners(target)
    normaliser = torch.logsumexp(scaled, -1)  # (N,)
    kept = scaled[owner, target.ids] - normaliser[owner]
    weights = target.weights.to(kept.dtype)
    if target.log_residual is None:
        return owner, weights, kept
    counts = target.offsets.diff()
    # Without classes outside, or without teacher mass on them, the log-sum-exp would be over
    # nothing and have no gradient.
    some = ((counts < scaled.shape[1]) & (target.log_residual > -torch.inf)).nonzero().squeeze(-1)
    mask = torch.zeros(scaled.shape, dtype=torch.bool, device=scaled.device)
    mask[owner, target.ids] = True
    outside = scaled.masked_fill(mask, -torch.inf)[some]
    log_outside = torch.logsumexp(outside, -1) - normaliser[some]
    rest = target.log_residual.to(kept.dtype).exp()[some]
    return torch.cat([owner, some]), torch.cat([weights, rest]), torch.cat([kept, log_outside])


def _pointwise(kind: Divergence, q: Tensor, log_p: Tensor, share: float | None) -> Tensor:
    """Return the contribution of each bucket to the divergence.

    Teacher probabilities are clamped to the smallest positive float32, so that ratios stay finite.
    `log_p` may be as low as -1e4, where `p` is 0: formulas use logarithms.
    """
    log_q = q.clamp_min(torch.finfo(torch.float32).tiny).log()
    p = log_p.exp()
    if kind == "reverse-kl":
        return p * (log_p - log_q)
    if kind == "total-variation":
        return (q - p).abs() / 2
    if share is None:
        raise MisuseError(f"--divergence {kind}: has no formula over classes")
    log_mixed = torch.logaddexp(log_q + math.log(share), log_p + math.log1p(-share))
    to_mixture = q * (log_q - log_mixed)
    if kind == "skewed-kl":
        return to_mixture
    assert kind == "jensen-shannon", kind
    return share * to_mixture + (1 - share) * p * (log_p - log_mixed)


def _logit_mse(logits: Tensor, target: Target, temperature: float) -> Tensor:
    """Return the squared difference of mean-centred logits, averaged over classes; `full` only.

    A class with teacher probability 0 has no logit to match and is left out of the mean.
    """
    teacher = temperature * target.weights.to(logits.dtype).reshape(logits.shape).log()  # the logits up to a constant
    finite = teacher.isfinite()
    count = finite.sum(-1).clamp_min(1)

    def centred(values: Tensor) -> Tensor:
        some = values.where(finite, 0.0)
        return (some - (some.sum(-1) / count)[:, None]).where(finite, 0.0)

    return (centred(logits) - centred(teacher)).square().sum(-1) / count
