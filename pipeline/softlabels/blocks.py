"""Logits in blocks of 64 classes: one pass finds the peak of each block, and most of the work then looks at few blocks.

The K largest classes, those above a threshold and those that sampling hits all lie in a handful of
the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64

#: Positions at a time. On a CPU (chunk, V) must stay in its caches: at V = 49,152 thirty-two rows
#: of float32 are 6 MB, and so are more of fewer classes.
_CHUNK, _LEAST, _LOGITS = 1024, 32, 1 << 20


def chunk_positions(logits: Tensor) -> int:
    """How many positions of (N, V) logits are encoded at a time."""
    return _CHUNK if logits.device.type != "cpu" else min(_CHUNK, max(_LEAST, _LOGITS // max(logits.shape[1], 1)))


class Workspace:
    """Memory that is used again for every chunk: fresh pages cost more than what is computed in them."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def like(self, tensor: Tensor, name: str) -> Tensor:
        """Uninitialised memory of the shape of a tensor; the one of this name that was given before is overwritten."""
        found = self._tensors.get(name)
        if found is None or len(found) < len(tensor):
            found = self._tensors[name] = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        return found[: len(tensor)]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Logits of N positions, filled up with -inf (probability 0) to V' = 64 M classes."""

    logits: Tensor
    """(N, V') float32, or float64 where they came so."""
    peaks: Tensor
    """(N, M): the largest of each block."""
    peak: Tensor
    """(N,): the largest of each position."""
    best: Tensor
    """(N,) int64: the first class that has it."""
    workspace: Workspace

    @classmethod
    def of(cls, logits: Tensor, workspace: Workspace) -> Blocks:
        """(N, V) of any float type; all chunks that share a workspace have one V and one type."""
        wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        missing = -wide.shape[1] % BLOCK
        padded = torch.nn.functional.pad(wide, (0, missing), value=-torch.inf) if missing else wide
        peaks = in_blocks(padded).amax(-1)
        peak, block = peaks.max(-1)  # of equals the first
        every = torch.arange(len(peak), device=peak.device)
        return cls(padded, peaks, peak, block * BLOCK + in_blocks(padded)[every, block].argmax(-1), workspace)

    def probabilities(self, temperature: float = 1.0) -> Tensor:
        """(N, V') softmax(z / T), in a workspace that is good until the next call."""
        scaled = self.logits
        if temperature != 1.0:
            scaled = torch.mul(self.logits, 1 / temperature, out=self.workspace.like(self.logits, "scaled"))
        return torch.softmax(scaled, -1, out=self.workspace.like(self.logits, "probabilities"))

    def mean(self, probabilities: Tensor) -> Tensor:
        """(N,) float64: the mean logit under (N, V') probabilities.

        The mean of 0 * -inf is taken as 0.
        """
        product = torch.mul(probabilities, self.logits, out=self.workspace.like(self.logits, "scaled"))
        mean = block_sums(product).sum(-1)
        if bool(mean.isnan().any()):
            mean = block_sums(product.nan_to_num_(nan=0.0)).sum(-1)
        return mean

    def largest(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits of each position, (N, k), falling, and their classes.

        They lie in the k blocks of the largest peaks.
        """
        if self.peaks.shape[1] <= k:
            values, ids = self.logits.topk(min(k, self.logits.shape[1]), dim=-1)
            return values, ids
        among = self.peaks.topk(k, dim=-1, sorted=False).indices.sort(-1).values  # (N, k) blocks, rising
        every = torch.arange(len(among), device=among.device)[:, None]
        values, where = in_blocks(self.logits)[every, among].flatten(1).topk(k, dim=-1)
        return values, among.gather(1, where // BLOCK) * BLOCK + where % BLOCK


def in_blocks(values: Tensor) -> Tensor:
    """(N, V') -> (N, M, 64), a view."""
    return values.view(len(values), -1, BLOCK)


def block_sums(values: Tensor) -> Tensor:
    """(N, V') -> (N, M) float64.

    Sixty-four values are summed in their own precision; it is the thousands of sums that need more.
    """
    return in_blocks(values).sum(-1).double()
