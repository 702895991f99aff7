"""Encode logits as SoftLabels: select what is kept of each distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import EncodingError
from pipeline.records import NO_LABEL, Encoding, Full, Sampled, Score, SoftLabels, TeacherScores, TopK, TopP
from pipeline.softlabels.blocks import BLOCK, Blocks, Workspace, block_sums, chunk_positions, in_blocks
from pipeline.softlabels.ragged import offsets_of
from pipeline.softlabels.sampling import sample_tail

#: Probabilities below this are inexact in float32; such a residual is computed by log-sum-exp in
#: float64.
_TINY = 1e-30
#: Number of classes that top-p considers first; it considers more if these do not reach p.
_FIRST_CLASSES = 256


def encode(
    logits: Tensor, encoding: Encoding, *, uniforms: Tensor | None = None, generator: torch.Generator | None = None
) -> SoftLabels:
    """Encode N distributions.

    Args:
        logits: (N, V) float, raw teacher output. -inf is a class of probability 0.
        uniforms: (N,) float64 in [0, 1), for `sampled`. None: drawn from `generator`, or from
            torch's default generator.

    Returns:
        N positions on the CPU, as exact as float32; `narrow` rounds them as they are stored.

    Raises:
        EncodingError: a row has NaN, +inf or no finite logit.
    """
    if uniforms is None:
        uniforms = torch.rand(len(logits), generator=generator, dtype=torch.float64)
    return _encode(logits, None, encoding, uniforms)[0]


def encode_and_score(
    logits: Tensor, labels: Tensor, encoding: Encoding, uniforms: Tensor
) -> tuple[SoftLabels, TeacherScores]:
    """Compute `encode` and `teacher_scores` in one pass that shares intermediate results.

    Args:
        labels: (N,) int64, -100 if unknown.

    Returns:
        N positions, and their scores. The entropy is of the distribution whose log-probabilities
        are kept (at T = 1, or the T of `sampled`).

    Raises:
        EncodingError: a row has NaN, +inf or no finite logit.
    """
    return _encode(logits, labels, encoding, uniforms)


def teacher_scores(logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> TeacherScores:
    """Return the teacher's negative log-likelihood of the hard labels, and its entropy.

    Args:
        logits: (N, V) float.
        labels: (N,) int64, -100 if unknown.
        temperature: for the entropy; the likelihood is always at 1.

    Returns:
        (N,) and (N,) float32, nats, on the CPU. The likelihood is 0 where the label is unknown.
    """
    parts = []
    step, workspace = chunk_positions(logits), Workspace()
    for start in range(0, len(logits), step):
        blocks = Blocks.of(logits[start : start + step].detach(), workspace)
        q = blocks.probabilities(temperature)
        parts.append(_score(blocks, q, block_sums(q).sum(-1), labels[start : start + step], temperature))
    return _join_scores(parts)


# --------------------------------------------------------------------------------------- all chunks


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is kept of one chunk of n positions, numbered from 0."""

    owner: Tensor
    """(K,) int64: the position of each class of the top, ascending."""
    ids: Tensor
    """(K,) int64; within a position by descending probability (`full`: by id)."""
    logprobs: Tensor
    """(K,) float64."""
    tail_owner: Tensor | None = None
    tail_ids: Tensor | None = None
    log_residuals: Tensor | None = None
    """(n, G) float64."""


def _encode(
    logits: Tensor, labels: Tensor | None, encoding: Encoding, uniforms: Tensor
) -> tuple[SoftLabels, TeacherScores]:
    """Encode some positions at a time, so that intermediate results stay in the CPU's caches."""
    count, num_classes = logits.shape
    if isinstance(encoding, Score):
        return _scores(logits, labels, encoding)
    step, workspace = chunk_positions(logits), Workspace()
    kept: list[tuple[int, _Kept]] = []
    scores = []
    for start in range(0, count, step):
        part = slice(start, start + step)
        blocks = Blocks.of(logits[part].detach(), workspace)
        _check_finite(blocks, start)
        temperature = encoding.temperature if isinstance(encoding, Sampled) else 1.0
        q = blocks.probabilities(temperature)
        sums = block_sums(q)
        if labels is not None:
            scores.append(_score(blocks, q, sums.sum(-1), labels[part], temperature))
        if isinstance(encoding, Full):
            found = _full(blocks, num_classes)
        elif isinstance(encoding, Sampled):
            found = _sampled(q, sums, blocks, encoding, uniforms[part])
        else:
            found = _top(q, blocks, encoding, num_classes)
        kept.append((start, found))
    return _join(kept, encoding, count, num_classes), _join_scores(scores)


def _scores(logits: Tensor, labels: Tensor | None, encoding: Score) -> tuple[SoftLabels, TeacherScores]:
    """Return (N, 1) scores unchanged, and their squared errors."""
    values = logits[:, 0].detach().float().cpu()
    bad = torch.nonzero(~torch.isfinite(values))
    if len(bad):
        raise EncodingError(f"position {int(bad[0])}: expected a finite score, found {float(values[bad[0]])}")
    none = torch.zeros(0, dtype=torch.int64)
    count = len(values)
    ids, start = torch.zeros(count, dtype=torch.int64), torch.zeros(count + 1, dtype=torch.int64)
    soft = SoftLabels(encoding, 1, torch.arange(count + 1), ids, values, start, none, torch.zeros(count, 0))
    errors = torch.zeros(0) if labels is None else (values - labels.cpu().float()).square().nan_to_num(nan=0.0)
    return soft, TeacherScores(errors, torch.zeros_like(errors))


def _join(parts: list[tuple[int, _Kept]], encoding: Encoding, count: int, num_classes: int) -> SoftLabels:
    def joined(name: str, dtype: torch.dtype = torch.int64) -> Tensor:
        values = [getattr(part, name) + (start if "owner" in name else 0) for start, part in parts if len(part.owner)]
        return torch.cat([torch.zeros(0, dtype=dtype), *(v.to("cpu", dtype) for v in values)])

    sampled = isinstance(encoding, Sampled)
    grid = len(getattr(encoding, "temperatures", ()))
    tail_owner = joined("tail_owner") if sampled else torch.zeros(0, dtype=torch.int64)
    residuals = [part.log_residuals.float().cpu() for _, part in parts if part.log_residuals is not None]
    return SoftLabels(
        encoding,
        num_classes,
        top_offsets=offsets_of(torch.bincount(joined("owner"), minlength=count)),
        top_ids=joined("ids"),
        top_logprobs=joined("logprobs", torch.float32),
        tail_offsets=offsets_of(torch.bincount(tail_owner, minlength=count)),
        tail_ids=joined("tail_ids") if sampled else torch.zeros(0, dtype=torch.int64),
        log_residuals=torch.cat([torch.zeros(0, grid), *residuals]) if grid else torch.zeros(count, 0),
    )


def _join_scores(parts: list[TeacherScores]) -> TeacherScores:
    return TeacherScores(
        *(torch.cat([torch.zeros(0), *(getattr(p, name) for p in parts)]) for name in ("nll", "entropy"))
    )


# ---------------------------------------------------------------------------------------- one chunk


def _full(blocks: Blocks, num_classes: int) -> _Kept:
    count = len(blocks.logits)
    log_sum = torch.logsumexp(blocks.logits, -1, keepdim=True)
    logprobs = (blocks.logits - log_sum)[:, :num_classes]
    ids = torch.arange(num_classes).repeat(count)
    return _Kept(torch.arange(count).repeat_interleave(num_classes), ids, logprobs.flatten())


def _sampled(q: Tensor, sums: Tensor, blocks: Blocks, encoding: Sampled, uniforms: Tensor) -> _Kept:
    """Keep the classes that reach 1/c and the argmax, and sample the others.

    `q` (N, V') and `sums` (N, M) are overwritten.
    """
    c = encoding.sample_size
    parts = in_blocks(q)  # (N, M, 64)
    total = sums.sum(-1)  # (N,): 1 up to float32 errors over thousands of classes
    best_block = blocks.best // BLOCK
    best_q = q.gather(1, blocks.best[:, None])
    # The blocks that may contain classes of the top: their peak reaches 1/c, up to rounding.
    relative = ((blocks.peaks - blocks.peak[:, None]) / encoding.temperature).exp_()
    reaching = relative >= 0.9999 / c / best_q
    reaching.scatter_(1, best_block[:, None], True)
    position, block = reaching.nonzero(as_tuple=True)
    candidates = parts[position, block]  # (H, 64)
    is_best = torch.zeros_like(candidates, dtype=torch.bool)
    # (N,): the block of each position's argmax
    home = (block == best_block[position]).nonzero().squeeze(-1)
    is_best[home, blocks.best % BLOCK] = True
    likely = (candidates >= (total / c)[position, None]) | is_best
    hit, offset = likely.nonzero(as_tuple=True)
    owner, ids = position[hit], block[hit] * BLOCK + offset
    found = candidates[hit, offset].double() / total[owner]
    # By position, then by descending probability; of equal ones, the argmax first.
    order = torch.argsort(4.0 * owner - found - is_best[hit, offset].double(), stable=True)
    candidates.masked_fill_(likely, 0.0)
    parts[position, block] = candidates
    sums[position, block] = candidates.double().sum(-1)
    tail_owner, tail_ids = sample_tail(parts, sums, c / total, uniforms.to(q.device))
    return _Kept(owner[order], ids[order], found[order].log(), tail_owner, tail_ids)


def _top(q: Tensor, blocks: Blocks, encoding: TopK | TopP, num_classes: int) -> _Kept:
    """Keep the most likely classes, and compute the log of the mass outside them.

    The residual is a sum over the classes outside, not 1 minus a sum, so that even 1e-12 is exact.
    `q` (N, V') is overwritten.
    """
    if isinstance(encoding, TopK):
        values, ids = blocks.largest(min(encoding.k, num_classes))  # (N, K), descending
        kept = values > -torch.inf
    else:
        values, ids, kept = _until(blocks, encoding.p, q)
    best = q.gather(1, ids[:, :1]).double()
    logprobs = best.log() + (values - blocks.peak[:, None]).double()
    residuals = []
    for temperature in encoding.temperatures:  # each overwrites q
        weights = blocks.probabilities(temperature)
        found = weights.gather(1, ids)
        weights.scatter_(1, ids, found.masked_fill(kept, 0.0))
        outside = block_sums(weights).sum(-1)  # (N,)
        inside = found.masked_fill(~kept, 0.0).double().sum(-1)
        residual = outside.log() - (inside + outside).log()
        lost = ((outside < _TINY) & (kept.sum(-1) < num_classes)).nonzero().squeeze(-1)
        if len(lost):
            residual[lost] = _log_residual(blocks, ids, kept, lost, temperature)
        residuals.append(residual)
    owner = torch.arange(len(q), device=q.device).repeat_interleave(kept.sum(-1))
    return _Kept(owner, ids[kept], logprobs[kept], log_residuals=torch.stack(residuals, -1))


def _until(blocks: Blocks, p: float, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the fewest classes that reach p.

    Returns:
        (N, K) logits, descending; their class ids; and (N, K) bool, which of them are kept.
    """
    k, most = _FIRST_CLASSES, blocks.logits.shape[1]
    while True:
        values, ids = blocks.largest(min(k, most))
        probabilities = q.gather(1, ids).double()
        kept = (probabilities.cumsum(-1) - probabilities < p) & (values > -torch.inf)
        if k >= most or not bool(kept[:, -1].any()):
            return values, ids, kept
        k *= 8


def _log_residual(blocks: Blocks, ids: Tensor, kept: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """Return (R,) float64: log of the mass outside the kept classes of `rows`, by log-sum-exp."""
    scaled = blocks.logits[rows].double() / temperature
    outside = scaled.scatter(1, ids[rows], scaled.gather(1, ids[rows]).masked_fill(kept[rows], -torch.inf))
    return torch.logsumexp(outside, -1) - torch.logsumexp(scaled, -1)


def _score(blocks: Blocks, q: Tensor, total: Tensor, labels: Tensor, temperature: float) -> TeacherScores:
    """Return the scores of one chunk.

    Args:
        q: softmax(z / T), (N, V').
        total: (N,) sum of `q`: 1 up to float32 errors.

    With s = (z - peak) / T, the entropy is log(sum of exp(s)) - E[s], and log(sum of exp(s)) is
    minus the log of the largest probability.
    """
    log_sum = total.log() - q.gather(1, blocks.best[:, None]).double().log().squeeze(-1)
    entropy = log_sum - (blocks.mean(q) / total - blocks.peak.double()) / temperature
    if temperature != 1.0:
        log_sum = torch.logsumexp(blocks.logits - blocks.peak[:, None], -1).double()
    picked = blocks.logits.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1).double() - blocks.peak.double()
    nll = torch.where(labels != NO_LABEL, log_sum - picked, 0.0)
    return TeacherScores(nll.float().cpu(), entropy.float().cpu())


def _check_finite(blocks: Blocks, start: int) -> None:
    """Refuse rows that are not a distribution.

    NaN and +inf propagate to the peak, and the peak of rows without a finite logit is -inf.
    """
    bad = ~torch.isfinite(blocks.peak)
    if not bool(bad.any()):
        return
    row = int(bad.nonzero()[0])
    values = blocks.logits[row]
    what = "NaN" if bool(values.isnan().any()) else "+inf" if bool((values == torch.inf).any()) else "no finite logit"
    raise EncodingError(f"position {start + row}: expected finite logits, found {what}")
