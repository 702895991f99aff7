"""The mass outside the top of `top-k` and `top-p`, at any temperature inside the grid.

It is exact at the points of the grid, and interpolated between them within bounds. With b = 1/T and
l the log-probabilities at T = 1, let A(b) be the log of the sum of exp(b l) over the classes
outside the top, and B(b) that over the top. B is known at every b. The residual r gives A at the
grid: A = B + log(r / (1 - r)). A log-sum-exp is convex in b, so between two points

    A <= the chord through them;
    A >= the chords through two points on either side, extended;
    A >= A(b1) - l_K (b1 - b), with b1 the point above and l_K the smallest log-probability
         kept, since A' is a mean of l over classes below it.

The estimate is the polynomial through all points, clipped to these bounds. log r changes by less
than A, so its error is smaller than the distance between the bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.records import SoftLabels, TopK, TopP
from pipeline.softlabels.ragged import owners, segment_logsumexp


def log_residual_at(soft: SoftLabels, temperature: float) -> Tensor:
    """Return the (N,) float32 log of the mass outside the top at T, nats.

    T must be inside the grid of `top-k` or `top-p`.
    """
    grid = _grid(soft)
    for point, t in enumerate(grid):
        if math.isclose(t, temperature):
            return soft.log_residuals[:, point]
    estimate, low, high, top = _outside(soft, grid, 1 / temperature)
    return _log_share(torch.minimum(torch.maximum(estimate, low), high), top, soft).float()


def log_residual_bounds(soft: SoftLabels, temperature: float) -> tuple[Tensor, Tensor]:
    """Return lower and upper bounds of the true log-residual, (N,) and (N,) float32, nats.

    They hold up to the rounding of the stored residuals, and are equal at a point of the grid.
    """
    grid = _grid(soft)
    if any(math.isclose(t, temperature) for t in grid):
        exact = log_residual_at(soft, temperature)
        return exact, exact
    _, low, high, top = _outside(soft, grid, 1 / temperature)
    return _log_share(low, top, soft).float(), _log_share(high, top, soft).float()


def _grid(soft: SoftLabels) -> Sequence[float]:
    assert isinstance(soft.encoding, TopK | TopP)
    return soft.encoding.temperatures


def _outside(soft: SoftLabels, grid: Sequence[float], b: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (N,) float64 each: an estimate of A(b), its lower and upper bounds, and B(b)."""
    # without duplicates
    order = sorted({t: i for i, t in enumerate(grid)}.values(), key=lambda i: -grid[i])
    points = [1 / grid[i] for i in order]  # ascending
    owner = owners(soft.top_offsets)
    logprobs = soft.top_logprobs.double()
    values = []  # A at each point
    for i, point in zip(order, points, strict=True):
        log_r = soft.log_residuals[:, i].double()
        log_odds = log_r - torch.log1p(-log_r.exp().clamp(max=1 - 1e-12))
        values.append(segment_logsumexp(point * logprobs, owner, len(soft)) + log_odds)
    above = next(j for j, point in enumerate(points) if point > b)
    below = above - 1

    def chord(i: int, j: int) -> Tensor:
        share = (b - points[i]) / (points[j] - points[i])
        return values[i] * (1 - share) + values[j] * share

    least = torch.full((len(soft),), torch.inf, dtype=torch.float64).scatter_reduce(0, owner, logprobs, "amin")
    lows = [values[above] - least * (points[above] - b)]
    if below > 0:
        lows.append(chord(below - 1, below))
    if above + 1 < len(points):
        lows.append(chord(above, above + 1))
    high = chord(below, above)
    low = torch.minimum(torch.stack(lows).amax(0), high)
    estimate = torch.zeros_like(high)
    for i, value in enumerate(values):  # Lagrange interpolation
        weight = math.prod((b - other) / (points[i] - other) for j, other in enumerate(points) if j != i)
        estimate = estimate + weight * value
    return estimate, low, high, segment_logsumexp(b * logprobs, owner, len(soft))


def _log_share(outside: Tensor, top: Tensor, soft: SoftLabels) -> Tensor:
    """Return log(exp(A) / (exp(A) + exp(B))); -inf where a stored residual is -inf."""
    share = -torch.nn.functional.softplus(top - outside)
    return share.masked_fill(soft.log_residuals.isneginf().any(-1), -torch.inf)
