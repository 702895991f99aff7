"""The mass outside the most likely classes, where nothing is known of it but that all masses sum to 1."""

from __future__ import annotations

import numpy as np

#: Mass that is left outside where rounding says that there is none, or less.
LEAST_OUTSIDE = 2.0**-24


def log_outside(mass: np.ndarray, counts: np.ndarray, num_classes: int, log_most: np.ndarray) -> np.ndarray:
    """The log of 1 - sum(p), within what can be.

    A position with classes outside has mass there: without any, losses would leave the outside out,
    and a reverse KL could be negative.

    Args:
        mass: (N,) float64, of the classes that are kept.
        counts: (N,) int64, how many these are.
        num_classes: V.
        log_most: (N,) float64, nats: the most that may be outside, V - K times the least likely of
            the K most likely classes; inf where that is not known.

    Returns:
        (N,) float64, nats; -inf where no class is outside.
    """
    found = np.minimum(np.log(np.maximum(1 - mass, LEAST_OUTSIDE)), log_most)
    return np.where(counts == num_classes, -np.inf, found)
