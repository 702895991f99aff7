"""Make the distribution that a student is trained to match from SoftLabels, at one temperature."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import EncodingError
from pipeline.records import Encoding, Full, Sampled, Score, SoftLabels, Target
from pipeline.softlabels.ragged import owners, segment_logsumexp
from pipeline.softlabels.residual import log_residual_at


def default_temperature(encoding: Encoding, otherwise: float) -> float:
    """Return the temperature of `sampled`, or `otherwise` for other encodings."""
    return encoding.temperature if isinstance(encoding, Sampled) else otherwise


def served_temperature(encoding: Encoding) -> float:
    """Return 1, or the nearest temperature that the encoding serves without interpolation."""
    if isinstance(encoding, Full | Score):
        return 1.0
    grid = (encoding.temperature,) if isinstance(encoding, Sampled) else encoding.temperatures
    return min(grid, key=lambda t: abs(math.log(t)))


def check_temperature(encoding: Encoding, temperature: float) -> None:
    """Check that an encoding serves a temperature.

    Raises:
        EncodingError: names the temperatures that it serves, and the encodings that serve this one.
    """
    if isinstance(encoding, Full | Score):
        return
    if isinstance(encoding, Sampled):
        if not math.isclose(temperature, encoding.temperature):
            raise EncodingError(
                f"--temperature {temperature:g}: a cache with encoding sampled serves {encoding.temperature:g}, chosen at capture; train at it, or cache again with "
                f"--encoding sampled --temperature {temperature:g}, or with --encoding full or top-k"
            )
        return
    low, high = min(encoding.temperatures), max(encoding.temperatures)
    if not low * (1 - 1e-9) <= temperature <= high * (1 + 1e-9):
        served = f"{low:g} to {high:g}" if low < high else f"{low:g}"
        raise EncodingError(
            f"--temperature {temperature:g}: a cache with encoding {encoding.kind} and this grid serves {served}; train inside it, "
            f"or cache again with --encoding full, or with --encoding {encoding.kind} --temperature {temperature:g}"
        )


def target(soft: SoftLabels, temperature: float, *, tail: str = "ghost", entropy: Tensor | None = None) -> Target:
    """Return the teacher's distribution at a temperature.

    Args:
        tail: for `top-k` and `top-p`, what becomes of the mass outside the top: `ghost` makes it
            one bucket (exact), `renormalize` spreads it over the top, `ignore` drops it. No effect
            on `full` and `sampled`.
        entropy: (N,) nats, for `sampled`: the teacher's entropy, measured at capture (that of a
            sample differs). Without it, KL is known up to this constant.

    Returns:
        N ragged distributions, float32; scores are returned unchanged. For `top-k` and `top-p`,
        q_T(i) = (1 - r_T) * softmax over the top of (logprob_i / T), where r_T is exact on the grid
        and interpolated between its points (see `residual`).

    Raises:
        EncodingError: the encoding does not serve this temperature.
    """
    check_temperature(soft.encoding, temperature)
    if isinstance(soft.encoding, Sampled):
        return _sampled_target(soft, soft.encoding, entropy)
    if isinstance(soft.encoding, Full):
        return _full_target(soft, temperature)
    if isinstance(soft.encoding, Score):
        return Target(1, soft.top_offsets, soft.top_ids, soft.top_logprobs, None, torch.zeros(len(soft)))
    scaled = soft.top_logprobs / temperature
    owner = owners(soft.top_offsets)
    # (sum K,), the weights of each position sum to 1
    log_weights = scaled - segment_logsumexp(scaled, owner, len(soft))[owner]
    log_residual = None
    if tail != "renormalize":
        outside = log_residual_at(soft, temperature)
        inside = torch.log1p(-outside.exp().clamp(max=1.0))
        log_weights = log_weights + inside[owner]
        log_residual = outside if tail == "ghost" else None
    weights = log_weights.exp()
    negative_entropy = torch.zeros(len(soft)).index_add(0, owner, _xlogx(weights, log_weights))
    if log_residual is not None:
        negative_entropy = negative_entropy + _xlogx(log_residual.exp(), log_residual)
    return Target(soft.num_classes, soft.top_offsets, soft.top_ids, weights, log_residual, negative_entropy)


def _full_target(soft: SoftLabels, temperature: float) -> Target:
    """Like `target`, for `full`, computed on a dense (N, V) matrix."""
    scaled = (soft.top_logprobs / temperature).view(len(soft), soft.num_classes)
    peak = scaled.amax(-1, keepdim=True)
    log_weights = scaled - (peak + _sums((scaled - peak).exp()).log()[:, None])
    weights = log_weights.exp()
    negative_entropy = _sums(_xlogx(weights, log_weights))
    return Target(soft.num_classes, soft.top_offsets, soft.top_ids, weights.flatten(), None, negative_entropy)


def _sums(values: Tensor) -> Tensor:
    """Sum (N, V) over classes to (N,), in the order in which sums over ragged classes are taken."""
    if values.device.type != "cpu":
        return values.sum(-1)
    return torch.from_numpy(np.add.reduce(np.ascontiguousarray(values.numpy().T), axis=0))


def _sampled_target(soft: SoftLabels, encoding: Sampled, entropy: Tensor | None) -> Target:
    offsets = soft.top_offsets + soft.tail_offsets  # each position: its top, then its tail
    device = soft.top_ids.device
    top = torch.arange(len(soft.top_ids), device=device) + soft.tail_offsets[:-1][owners(soft.top_offsets)]
    tail = torch.arange(len(soft.tail_ids), device=device) + soft.top_offsets[1:][owners(soft.tail_offsets)]
    ids = torch.empty(len(top) + len(tail), dtype=torch.int64, device=device)
    weights = torch.full((len(ids),), 1 / encoding.sample_size, device=device)
    ids[top], ids[tail] = soft.top_ids, soft.tail_ids
    weights[top] = soft.top_logprobs.exp()
    negative_entropy = torch.zeros(len(soft)) if entropy is None else -entropy
    return Target(soft.num_classes, offsets, ids, weights, None, negative_entropy)


def _xlogx(x: Tensor, log_x: Tensor) -> Tensor:
    return x * log_x.masked_fill(x == 0, 0.0)
