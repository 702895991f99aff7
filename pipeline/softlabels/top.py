"""Make soft labels from the top log-probabilities that inference servers return."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.errors import EncodingError
from pipeline.records import SoftLabels, TopK
from pipeline.softlabels.ragged import offsets_of


def top_soft_labels(
    ids: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]], num_classes: int, *, k: int
) -> SoftLabels:
    """Make `top-k` soft labels from the top log-probabilities of an inference server.

    Args:
        ids: N lists of class ids, by descending probability.
        logprobs: N lists of their log-probabilities at T = 1, nats.
        num_classes: V.
        k: the k of the encoding.

    Returns:
        N positions of `TopK(k, (1.0,))`. The mass outside is computed as 1 - sum(p) in float64, so
        it is as exact as the server's log-probabilities.

    Raises:
        EncodingError: a class id is repeated or out of range, or the mass exceeds 1.
    """
    counts = torch.tensor([len(row) for row in ids])
    flat_ids = torch.tensor([i for row in ids for i in row], dtype=torch.int64)
    flat = torch.tensor([value for row in logprobs for value in row], dtype=torch.float64)
    for n, row in enumerate(ids):
        if not row or len(set(row)) != len(row) or min(row) < 0 or max(row) >= num_classes:
            raise EncodingError(
                f"position {n}: expected distinct class ids of 0 to {num_classes - 1}, found {list(row)[:8]}"
            )
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    mass = torch.zeros(len(counts), dtype=torch.float64).index_add(0, owner, flat.exp())
    if bool((mass > 1.01).any()):
        n = int((mass > 1.01).nonzero()[0])
        raise EncodingError(
            f"position {n}: expected log-probabilities of a mass of at most 1, found {float(mass[n]):.3f}"
        )
    return SoftLabels(
        TopK(k, (1.0,)),
        num_classes,
        top_offsets=offsets_of(counts),
        top_ids=flat_ids,
        top_logprobs=flat.float(),
        tail_offsets=torch.zeros(len(counts) + 1, dtype=torch.int64),
        tail_ids=torch.zeros(0, dtype=torch.int64),
        log_residuals=torch.log((1 - mass).clamp_min(0.0))
        .float()
        .masked_fill(counts == num_classes, -torch.inf)
        .unsqueeze(-1),
    )
