"""A model's output matrix, and how logits are computed from it in chunks of positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Bytes of one chunk's float32 logits: large enough for efficient matrix products, and small
#: compared with the model.
_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
#: Least positions of a chunk, since each chunk reads and writes the gradient of the whole output
#: matrix once.
_LEAST_POSITIONS = 128


@dataclass(frozen=True, slots=True)
class Head:
    """How a model computes logits from hidden states h: cap * tanh(scale * (h W^T + b) / cap).

    With an infinite cap they are scale * (h W^T + b).
    """

    weight: Tensor
    """(V', H)."""
    bias: Tensor | None = None
    """(V',)."""
    scale: float = 1.0
    cap: float = math.inf

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, V'): return the logits of the model's own code."""
        return self.transform(torch.nn.functional.linear(hidden, self.weight, self.bias))

    def transform(self, logits: Tensor) -> Tensor:
        """Apply scale and cap to the output of the matrix."""
        return transform(logits, self.scale, self.cap)


def transform(logits: Tensor, scale: float, cap: float) -> Tensor:
    """Return cap * tanh(scale * logits / cap); with an infinite cap, scale * logits."""
    scaled = logits if scale == 1.0 else logits * scale
    return scaled if cap == math.inf else torch.tanh(scaled / cap) * cap


def chunk_positions(num_classes: int, device: str) -> int:
    """Return the positions per chunk: 32 MB of float32 logits on a CPU, 256 MB on a GPU.

    It is at least 128.
    """
    return max(_LEAST_POSITIONS, _CHUNK_BYTES.get(device, 256 << 20) // (4 * num_classes))


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype that autocast uses for matrix products, but float32 instead of float16.

    In float16, gradients of a mean over thousands of positions underflow.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return torch.float32 if dtype == torch.float16 else dtype
