"""The mass outside the top of `top-k` and `top-p` at any temperature inside the grid: exact at its points, interpolated between within a bound.

With b = 1/T and l the log-probabilities at T = 1, let A(b) be the log of the sum of exp(b l) over
the classes outside the top, and B(b) that over the top. B is known at every b. The residual r gives
A at the grid: A = B + log(r / (1 - r)). A log-sum-exp is convex in b, so that between two points

    A <= the chord through them;
    A >= the chords through two points on either side, drawn on;
    A >= A(b1) - l_K (b1 - b), with b1 the point above and l_K the least log-probability kept, since A' is a mean of l over classes below it.

The estimate is the polynomial through all points, cut to these bounds. log r moves by less than A
does: its error is below the width between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.records import SoftLabels, TopK, TopP
from pipeline.softlabels.ragged import owners, segment_logsumexp


def log_residual_at(soft: SoftLabels, temperature: float) -> Tensor:
    """(N,) float32, nats: log of the mass outside the top at T, which lies inside the grid of `top-k` or `top-p`."""
    grid = _grid(soft)
    for point, t in enumerate(grid):
        if math.isclose(t, temperature):
            return soft.log_residuals[:, point]
    estimate, low, high, top = _outside(soft, grid, 1 / temperature)
    return _log_share(torch.minimum(torch.maximum(estimate, low), high), top, soft).float()


def log_residual_bounds(soft: SoftLabels, temperature: float) -> tuple[Tensor, Tensor]:
    """(N,) and (N,) float32, nats: between which the true log-residual lies, up to the rounding of those stored. Equal at a point of the grid."""
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
    """(N,) float64 each: A(b) estimated, bounded from below and from above, and B(b)."""
    order = sorted({t: i for i, t in enumerate(grid)}.values(), key=lambda i: -grid[i])  # a temperature may stand twice
    points = [1 / grid[i] for i in order]  # rising
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
    for i, value in enumerate(values):  # Lagrange's form
        weight = math.prod((b - other) / (points[i] - other) for j, other in enumerate(points) if j != i)
        estimate = estimate + weight * value
    return estimate, low, high, segment_logsumexp(b * logprobs, owner, len(soft))


def _log_share(outside: Tensor, top: Tensor, soft: SoftLabels) -> Tensor:
    """log(exp(A) / (exp(A) + exp(B))); -inf where the residuals stored are."""
    share = -torch.nn.functional.softplus(top - outside)
    return share.masked_fill(soft.log_residuals.isneginf().any(-1), -torch.inf)
