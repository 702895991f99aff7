"""A model's output matrix, and how its logits are made in chunks of positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Bytes of one chunk's float32 logits: large enough for the matrix products, small enough to be
#: nothing beside the model.
_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
#: But at least so many positions: each chunk reads and writes the gradient of the whole output
#: matrix once.
_LEAST_POSITIONS = 128


@dataclass(frozen=True, slots=True)
class Head:
    """How a model makes logits of hidden states: cap * tanh(scale * (h W^T + b) / cap); without a cap, scale * (h W^T + b)."""

    weight: Tensor
    """(V', H)."""
    bias: Tensor | None = None
    """(V',)."""
    scale: float = 1.0
    cap: float = math.inf

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, V'), as the model's own code makes them."""
        return self.transform(torch.nn.functional.linear(hidden, self.weight, self.bias))

    def transform(self, logits: Tensor) -> Tensor:
        """What the model does to the output of its matrix."""
        return transform(logits, self.scale, self.cap)


def transform(logits: Tensor, scale: float, cap: float) -> Tensor:
    """What follows the matrix: cap * tanh(scale * logits / cap); without a cap, scale * logits."""
    scaled = logits if scale == 1.0 else logits * scale
    return scaled if cap == math.inf else torch.tanh(scaled / cap) * cap


def chunk_positions(num_classes: int, device: str) -> int:
    """How many positions' logits are held at once: 32 MB of them on a CPU, 256 MB on a GPU."""
    return max(_LEAST_POSITIONS, _CHUNK_BYTES.get(device, 256 << 20) // (4 * num_classes))


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """As autocast would have the matrix product; but gradients of a mean over thousands of positions underflow in float16."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return torch.float32 if dtype == torch.float16 else dtype
