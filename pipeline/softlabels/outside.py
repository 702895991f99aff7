"""The mass outside the most likely classes, computed as 1 minus their mass."""

from __future__ import annotations

import numpy as np

#: Minimum of the mass outside, used if rounding gives none or a negative one.
LEAST_OUTSIDE = 2.0**-24


def log_outside(mass: np.ndarray, counts: np.ndarray, num_classes: int, log_most: np.ndarray) -> np.ndarray:
    """Return the log of 1 - sum(p), kept within its possible range.

    If there are classes outside, the result is above -inf. Otherwise losses would ignore these
    classes, and a reverse KL could be negative.

    Args:
        mass: (N,) float64, of the classes that are kept.
        counts: (N,) int64, number of these classes, K.
        num_classes: V.
        log_most: (N,) float64, nats: log of the largest possible mass outside, V - K times the
            smallest of the K probabilities; inf if unknown.

    Returns:
        (N,) float64, nats; -inf if no class is outside.
    """
    found = np.minimum(np.log(np.maximum(1 - mass, LEAST_OUTSIDE)), log_most)
    return np.where(counts == num_classes, -np.inf, found)
