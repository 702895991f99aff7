"""Logits over candidates whose number differs between rows: choices, or places of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

#: Names of the two positions of an answer in a text.
ENDS = ("start", "end")
#: The logit of a candidate that a row does not have. At every temperature in use, its probability
#: and its gradient are 0.
ABSENT = -1e4
#: Stands for the number of classes of a model whose head scores any number of candidates.
ANY_NUMBER = 1 << 20


def own_logits(logits: Tensor, has: Tensor) -> Tensor:
    """Extend logits of C candidates to V, and mask the candidates that a row does not have.

    Args:
        logits: (..., C), of the first C candidates.
        has: (..., V) bool, V at least C: which candidates each row has.

    Returns:
        (..., V): `ABSENT` where a row does not have the candidate.
    """
    wide = torch.nn.functional.pad(logits, (0, has.shape[-1] - logits.shape[-1]), value=ABSENT)
    return wide.masked_fill(~has, ABSENT)


def choice_names(count: int) -> tuple[str, ...]:
    """Return the names of a cache's choices: "choice 1", "choice 2", and so on."""
    return tuple(f"choice {i}" for i in range(1, count + 1))
