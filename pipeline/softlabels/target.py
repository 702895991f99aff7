"""SoftLabels -> Target: the distribution a student is trained towards, at one temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.errors import EncodingError
from pipeline.records import Encoding, Full, Sampled, SoftLabels, Target
from pipeline.softlabels.ragged import offsets_of, owners


def default_temperature(encoding: Encoding, otherwise: float) -> float:
    """The one temperature of `sampled`, else `otherwise`."""
    return encoding.temperature if isinstance(encoding, Sampled) else otherwise


def served_temperature(encoding: Encoding) -> float:
    """The temperature to look at a cache with: 1 where it is served, else the one nearest to it."""
    if isinstance(encoding, Full):
        return 1.0
    grid = (encoding.temperature,) if isinstance(encoding, Sampled) else encoding.temperatures
    return min(grid, key=lambda t: abs(math.log(t)))


def check_temperature(encoding: Encoding, temperature: float) -> None:
    """Refuse what an encoding cannot serve.

    Raises:
        EncodingError: names the temperatures that it serves, and the encodings that would serve this one.
    """
    if isinstance(encoding, Full):
        return
    served = (encoding.temperature,) if isinstance(encoding, Sampled) else encoding.temperatures
    if not any(math.isclose(temperature, t) for t in served):
        listed = ", ".join(f"{t:g}" for t in served)
        raise EncodingError(
            f"--temperature {temperature:g}: a cache with encoding {encoding.kind} serves {listed}; train at one of these, "
            f"or cache again with --encoding full, or with --encoding top-k --temperature {temperature:g}"
        )


def target(soft: SoftLabels, temperature: float, *, tail: str = "ghost", entropy: Tensor | None = None) -> Target:
    """The teacher's distribution at a temperature.

    Args:
        tail: for `top-k` and `top-p`, the mass outside the top: `ghost` makes it one bucket (exact), `renormalize` spreads it
            over the top, `ignore` drops it. `full` and `sampled` have none.
        entropy: (N,) nats, for `sampled`: the teacher's own, as measured at capture (a sample's own entropy is not the teacher's). Without it KL
            is known up to that constant.

    Returns:
        N ragged distributions, float32. On the grid q_T(i) = (1 - r_T) * softmax over the top of (logprob_i / T).

    Raises:
        EncodingError: the encoding does not serve this temperature.
    """
    check_temperature(soft.encoding, temperature)
    if isinstance(soft.encoding, Sampled):
        return _sampled_target(soft, soft.encoding, entropy)
    scaled = soft.top_logprobs / temperature
    owner = owners(soft.top_offsets)
    log_weights = scaled - _segment_logsumexp(scaled, owner, len(soft))[owner]  # (sum K,), each position sums to 1
    log_residual = None
    if not isinstance(soft.encoding, Full):
        grid = soft.encoding.temperatures
        point = next(i for i, t in enumerate(grid) if math.isclose(t, temperature))
        if tail != "renormalize":
            inside = torch.log1p(-soft.log_residuals[:, point].exp().clamp(max=1.0))
            log_weights = log_weights + inside[owner]
        if tail == "ghost":
            log_residual = soft.log_residuals[:, point]
    weights = log_weights.exp()
    negative_entropy = torch.zeros(len(soft)).index_add(0, owner, _xlogx(weights, log_weights))
    if log_residual is not None:
        negative_entropy = negative_entropy + _xlogx(log_residual.exp(), log_residual)
    return Target(soft.num_classes, soft.top_offsets, soft.top_ids, weights, log_residual, negative_entropy)


def _sampled_target(soft: SoftLabels, encoding: Sampled, entropy: Tensor | None) -> Target:
    counts = soft.top_offsets.diff() + soft.tail_offsets.diff()
    owner = torch.cat([owners(soft.top_offsets), owners(soft.tail_offsets)])
    order = torch.argsort(owner, stable=True)  # each position: its top, then its tail
    weights = torch.cat([soft.top_logprobs.exp(), torch.full((len(soft.tail_ids),), 1 / encoding.sample_size)])
    negative_entropy = torch.zeros(len(soft)) if entropy is None else -entropy
    ids = torch.cat([soft.top_ids, soft.tail_ids])[order]
    return Target(soft.num_classes, offsets_of(counts), ids, weights[order], None, negative_entropy)


def _segment_logsumexp(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """(sum K,) values -> (N,) log-sum-exp of each position's own."""
    peak = torch.full((count,), -torch.inf, dtype=values.dtype).scatter_reduce(0, owner, values, "amax")
    total = torch.zeros(count, dtype=values.dtype).scatter_add(0, owner, (values - peak[owner]).exp())
    return peak + total.log()


def _xlogx(x: Tensor, log_x: Tensor) -> Tensor:
    return x * log_x.masked_fill(x == 0, 0.0)
