"""Logits -> SoftLabels: what of each distribution is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import EncodingError
from pipeline.records import NO_LABEL, Encoding, Full, Sampled, SoftLabels, TeacherScores, TopK
from pipeline.softlabels.ragged import empty, offsets_of
from pipeline.softlabels.sampling import sample_tail


def encode(
    logits: Tensor, encoding: Encoding, *, uniforms: Tensor | None = None, generator: torch.Generator | None = None
) -> SoftLabels:
    """Keep of N distributions what the encoding keeps.

    Args:
        logits: (N, V) float, raw teacher output. -inf is a class of probability 0.
        uniforms: (N,) float64 in [0, 1), for `sampled`; drawn from `generator` (or torch's own) where it is None.

    Returns:
        N positions, on the CPU.

    Raises:
        EncodingError: a row with NaN, +inf or no finite logit.
    """
    check_finite(logits)
    count, num_classes = logits.shape
    if count == 0:
        return empty(encoding, num_classes)
    if isinstance(encoding, Full):
        return _encode_full(logits, encoding)
    if isinstance(encoding, Sampled):
        if uniforms is None:
            uniforms = torch.rand(count, generator=generator, dtype=torch.float64)
        return _encode_sampled(logits, encoding, uniforms)
    return _encode_top(logits, encoding)


def check_finite(logits: Tensor) -> None:
    """Refuse rows that are no distribution.

    Raises:
        EncodingError: names the first bad row and what is wrong with it.
    """
    bad = ~torch.isfinite(logits.amax(-1))  # NaN and +inf propagate through the maximum; all -inf leaves -inf
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        values = logits[row]
        what = (
            "NaN" if bool(values.isnan().any()) else "+inf" if bool((values == torch.inf).any()) else "no finite logit"
        )
        raise EncodingError(f"position {row}: expected finite logits, found {what}")


def teacher_scores(logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> TeacherScores:
    """The teacher's negative log-likelihood of the hard labels, and its entropy.

    Args:
        logits: (N, V) float.
        labels: (N,) int64, -100 where there is none.
        temperature: at which the entropy is taken; the likelihood is always at 1.

    Returns:
        (N,) and (N,) float32, nats, on the CPU.
    """
    centred = logits.float() - logits.float().amax(-1, keepdim=True)
    picked = centred.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    nll = torch.where(labels != NO_LABEL, torch.logsumexp(centred, -1) - picked, 0.0)
    softened = centred if temperature == 1.0 else centred / temperature
    lowest = torch.finfo(softened.dtype).min  # 0 * -inf would be nan, and 0 log 0 is 0
    mean = torch.linalg.vecdot(torch.softmax(softened, -1), softened.clamp_min(lowest))
    return TeacherScores(nll.cpu(), (torch.logsumexp(softened, -1) - mean).cpu())


def _encode_full(logits: Tensor, encoding: Encoding) -> SoftLabels:
    count, num_classes = logits.shape
    nothing = empty(encoding, num_classes)
    return SoftLabels(
        encoding,
        num_classes,
        top_offsets=torch.arange(count + 1) * num_classes,
        top_ids=torch.arange(num_classes).repeat(count),
        top_logprobs=torch.log_softmax(logits.float(), -1).cpu().flatten(),
        tail_offsets=torch.zeros(count + 1, dtype=torch.int64),
        tail_ids=nothing.tail_ids,
        log_residuals=torch.zeros(count, 0),
    )


def _encode_top(logits: Tensor, encoding: Encoding) -> SoftLabels:
    """`top-k` and `top-p`. The residual is a log-sum-exp over the classes outside, never 1 - sum: 1e-12 is exact too."""
    assert not isinstance(encoding, Full | Sampled)
    num_classes = logits.shape[1]
    centred = logits.float() - logits.float().amax(-1, keepdim=True)  # (N, V)
    if isinstance(encoding, TopK):
        values, ids = centred.topk(min(encoding.k, num_classes), dim=-1)  # (N, K), by falling logit
        kept = values > -torch.inf
    else:
        values, ids = centred.sort(dim=-1, descending=True, stable=True)
        probabilities = torch.softmax(values, -1, dtype=torch.float64)
        kept = (probabilities.cumsum(-1) - probabilities < encoding.p) & (values > -torch.inf)
    outside = centred.scatter(1, ids, torch.where(kept, -torch.inf, values))  # (N, V)
    grid = [_log_share(outside / t, centred / t) for t in encoding.temperatures]
    count = kept.sum(-1)
    logprobs = values - torch.logsumexp(centred, -1, keepdim=True)
    return SoftLabels(
        encoding,
        num_classes,
        top_offsets=offsets_of(count.cpu()),
        top_ids=ids[kept].cpu(),
        top_logprobs=logprobs[kept].cpu(),
        tail_offsets=torch.zeros(len(logits) + 1, dtype=torch.int64),
        tail_ids=torch.zeros(0, dtype=torch.int64),
        log_residuals=torch.stack(grid, -1).cpu(),
    )


def _log_share(part: Tensor, whole: Tensor) -> Tensor:
    """(N, V), (N, V) -> (N,): log of the share of exp(part) in exp(whole)."""
    return torch.logsumexp(part, -1) - torch.logsumexp(whole, -1)


def _encode_sampled(logits: Tensor, encoding: Sampled, uniforms: Tensor) -> SoftLabels:
    count, num_classes = logits.shape
    q = torch.softmax(logits.float() / encoding.temperature, -1).cpu()  # (N, V)
    likely = q >= 1 / encoding.sample_size
    likely.scatter_(1, q.argmax(-1, keepdim=True), True)
    position, ids = likely.nonzero(as_tuple=True)
    probabilities = q[position, ids]
    q[position, ids] = 0.0  # what is left is the tail
    tail_position, tail_ids = sample_tail(q, uniforms, sample_size=encoding.sample_size)
    # By position, then by falling probability: two stable sorts, the last one is the primary key.
    order = torch.argsort(probabilities, descending=True, stable=True)
    order = order[torch.argsort(position[order], stable=True)]
    return SoftLabels(
        encoding,
        num_classes,
        top_offsets=offsets_of(torch.bincount(position, minlength=count)),
        top_ids=ids[order],
        top_logprobs=probabilities[order].log(),
        tail_offsets=offsets_of(torch.bincount(tail_position, minlength=count)),
        tail_ids=tail_ids,
        log_residuals=torch.zeros(count, 0),
    )
