"""Overlap of two token spans."""

from __future__ import annotations

import numpy as np


def overlap_of_spans(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """F1 score of the tokens of two spans.

    Args:
        labels: (R, 2) integers: first and last token of each span.
        predicted: (R, 2) integers. A span that ends before it begins is empty.

    Returns:
        (R,) in [0, 1]: 2 |A and B| / (|A| + |B|).
    """
    sizes = [np.maximum(spans[:, 1] - spans[:, 0] + 1, 0) for spans in (labels, predicted)]
    first, last = np.maximum(labels[:, 0], predicted[:, 0]), np.minimum(labels[:, 1], predicted[:, 1])
    common = np.where((sizes[0] > 0) & (sizes[1] > 0), np.maximum(last - first + 1, 0), 0)
    shares: np.ndarray = 2 * common / np.maximum(sizes[0] + sizes[1], 1)
    return shares
