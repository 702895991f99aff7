"""Convert SoftLabels to a smaller encoding, if that is as exact as encoding the logits with it.

For `sampled`, the result is as unbiased as if the logits had been sampled.

- `full` to any other: the logits are known, so this is `encode`.
- `top-k`, `top-p` to fewer classes of the same encoding, at temperatures of its grid: the mass that
  leaves the top is known, and is added to the residual.
- `sampled` to a smaller c at the same temperature: the kept weights t are sampled again.
  E[t' | t] = t, so E[t'] = E[t] = q.

Sampling t at c' < c has the variance of sampling q at c', class by class: for a class of the tail
E[t'^2] = E[t] / c' = q / c', and a class of the top has t = q.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from pipeline.errors import EncodingError
from pipeline.records import Encoding, Full, Sampled, Score, SoftLabels, TopK, TopP
from pipeline.softlabels.encode import encode
from pipeline.softlabels.narrow import narrow
from pipeline.softlabels.ragged import offsets_of, owners, segment_logsumexp
from pipeline.softlabels.sampling import round_unbiased


def check_conversion(source: Encoding, wanted: Encoding) -> None:
    """Check that an encoding can be made from a stored one.

    Raises:
        EncodingError: says why not, and what can be made.
    """
    if isinstance(source, Score):
        raise EncodingError(
            f"--encoding {wanted.kind}: the cache holds scores, which have one encoding; leave it as it is"
        )
    if isinstance(wanted, Full):
        raise EncodingError("--encoding full: classes that were not kept cannot be restored; cache the logits again")
    if isinstance(source, Full):
        return
    where = f"from {source.kind} to {wanted.kind}"
    if source.kind != wanted.kind:
        why = {
            "sampled": "its rare classes are a random sample, so that the largest of them, and the mass outside, are unknown",
            "top-k": "the classes outside the top are not known one by one",
            "top-p": "the classes outside the top are not known one by one, and the number kept differs by position",
        }[source.kind]
        raise EncodingError(f"{where}: {why}; convert a cache with encoding full, or cache the logits again")
    if isinstance(source, Sampled) and isinstance(wanted, Sampled):
        if not math.isclose(source.temperature, wanted.temperature):
            raise EncodingError(
                f"--temperature: a cache with encoding sampled has {source.temperature:g} only, found {wanted.temperature:g}; cache the logits again"
            )
        _expect_smaller("--sample-size", source.sample_size, wanted.sample_size)
        return
    assert isinstance(source, TopK | TopP)
    assert isinstance(wanted, TopK | TopP)
    if isinstance(source, TopK) and isinstance(wanted, TopK):
        _expect_smaller("--top-k", source.k, wanted.k, or_equal=wanted.temperatures != source.temperatures)
    if isinstance(source, TopP) and isinstance(wanted, TopP):
        _expect_smaller("--top-p", source.p, wanted.p, or_equal=wanted.temperatures != source.temperatures)
    for temperature in wanted.temperatures:
        if _point(source.temperatures, temperature) is None:
            raise EncodingError(
                f"--temperature {temperature:g}: the mass outside is known exactly at {', '.join(f'{t:g}' for t in source.temperatures)} only; choose among these"
            )


def convert(soft: SoftLabels, wanted: Encoding, *, uniforms: Tensor) -> SoftLabels:
    """Convert N positions to a smaller encoding.

    Args:
        uniforms: (N,) float64 in [0, 1), for `sampled`; independent of those with which `soft` was
            sampled.

    Returns:
        N positions, rounded as they are stored (`narrow`).

    Raises:
        EncodingError: see `check_conversion`.
    """
    check_conversion(soft.encoding, wanted)
    if isinstance(soft.encoding, Full):
        logits = soft.top_logprobs.reshape(len(soft), soft.num_classes)
        return narrow(encode(logits, wanted, uniforms=uniforms), uniforms)
    if isinstance(wanted, Sampled):
        return _sample_again(soft, wanted, uniforms)
    assert isinstance(wanted, TopK | TopP)
    return _shorten(soft, wanted)


def _shorten(soft: SoftLabels, wanted: TopK | TopP) -> SoftLabels:
    """Keep the first classes of each position, and add the mass of the others to the residuals.

    At each temperature, log r' = log(r + the mass of the dropped classes).
    """
    assert isinstance(soft.encoding, TopK | TopP)
    owner = owners(soft.top_offsets)
    logprobs = soft.top_logprobs.double()
    start = soft.top_offsets[:-1][owner]
    if isinstance(wanted, TopK):
        stays = torch.arange(len(owner)) - start < wanted.k
    else:
        mass = torch.cumsum(logprobs.exp(), 0) - logprobs.exp()  # of all earlier classes
        stays = (mass - mass[start] < wanted.p) | (torch.arange(len(owner)) == start)
    residuals = []
    for temperature in wanted.temperatures:
        point = _point(soft.encoding.temperatures, temperature)
        assert point is not None
        scaled = logprobs / temperature
        log_r = soft.log_residuals[:, point].double()
        leaving = segment_logsumexp(scaled[~stays], owner[~stays], len(soft)).nan_to_num(nan=-torch.inf)
        share = leaving - segment_logsumexp(scaled, owner, len(soft))
        inside = torch.log1p(-log_r.exp().clamp(max=1.0))
        residuals.append(torch.logaddexp(log_r, inside + share))
    return dataclasses.replace(
        soft,
        encoding=wanted,
        top_offsets=offsets_of(torch.bincount(owner[stays], minlength=len(soft))),
        top_ids=soft.top_ids[stays],
        top_logprobs=soft.top_logprobs[stays],
        log_residuals=torch.stack(residuals, -1).float(),
    )


def _sample_again(soft: SoftLabels, wanted: Sampled, uniforms: Tensor) -> SoftLabels:
    """Sample the kept weights t again, at a smaller sample size c'.

    The argmax and weights of at least 1/c' stay. Each other class is kept with probability c' t, at
    weight 1/c'.
    """
    assert isinstance(soft.encoding, Sampled)
    size = wanted.sample_size
    top_owner, tail_owner = owners(soft.top_offsets), owners(soft.tail_offsets)
    weights = soft.top_logprobs.double().exp()
    stays = weights >= 1 / size
    stays[soft.top_offsets[:-1]] = True  # the argmax is the first class
    owner = torch.cat([top_owner[~stays], tail_owner])
    ids = torch.cat([soft.top_ids[~stays], soft.tail_ids])
    tail_weights = torch.full((len(tail_owner),), 1 / soft.encoding.sample_size, dtype=torch.float64)
    chances = torch.cat([weights[~stays], tail_weights]) * size
    order = torch.argsort(owner * soft.num_classes + ids)  # by position, then by class
    owner, ids, chances = owner[order], ids[order], chances[order]
    # for values below 1, unbiased rounding is systematic sampling
    hit = round_unbiased(chances, owner, uniforms) > 0
    sampled = dataclasses.replace(
        soft,
        encoding=wanted,
        top_offsets=offsets_of(torch.bincount(top_owner[stays], minlength=len(soft))),
        top_ids=soft.top_ids[stays],
        top_logprobs=soft.top_logprobs[stays],
        tail_offsets=offsets_of(torch.bincount(owner[hit], minlength=len(soft))),
        tail_ids=ids[hit],
    )
    return narrow(sampled, uniforms)


def _point(grid: tuple[float, ...], temperature: float) -> int | None:
    return next((i for i, t in enumerate(grid) if math.isclose(t, temperature)), None)


def _expect_smaller(flag: str, source: float, wanted: float, *, or_equal: bool = False) -> None:
    if not (wanted < source or (or_equal and wanted == source)):
        raise EncodingError(
            f"{flag}: expected below the cache's {source:g}, found {wanted:g}; nothing can be added to what was kept"
        )
