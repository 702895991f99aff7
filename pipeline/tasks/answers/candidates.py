"""Classes that are a row's own, its choices or the places of its tokens: rows have different numbers of them."""

from __future__ import annotations

import torch
from torch import Tensor

#: The positions of an answer that stands in a text.
ENDS = ("start", "end")
#: The logit of a candidate that a row does not have: its probability is 0, and so is its gradient,
#: at every temperature that is used.
ABSENT = -1e4
#: What a model's head is not asked for: it gives a logit to each candidate, however many there are.
ANY_NUMBER = 1 << 20


def own_logits(logits: Tensor, has: Tensor) -> Tensor:
    """Logits over all V candidates.

    Args:
        logits: (..., C), of the first C candidates.
        has: (..., V) bool, V at least C: which candidates each row has.

    Returns:
        (..., V): `ABSENT` where a row has no such candidate.
    """
    wide = torch.nn.functional.pad(logits, (0, has.shape[-1] - logits.shape[-1]), value=ABSENT)
    return wide.masked_fill(~has, ABSENT)


def choice_names(count: int) -> tuple[str, ...]:
    """What the choices of a cache are called: by their numbers from 1."""
    return tuple(f"choice {i}" for i in range(1, count + 1))
