"""Logits in blocks of 64 classes, so that most operations need to look at few blocks only.

One pass finds the peak of each block. The K largest classes, classes above a threshold, and sampled
classes are all in a few of the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64

#: Positions per chunk. On a CPU, a chunk of (positions, V) must stay in the caches: at V = 49,152,
#: 32 rows of float32 are 6 MB; fewer classes allow more rows.
_CHUNK, _LEAST, _LOGITS = 1024, 32, 1 << 20


def chunk_positions(logits: Tensor) -> int:
    """Return the number of positions of (N, V) logits to encode at a time."""
    return _CHUNK if logits.device.type != "cpu" else min(_CHUNK, max(_LEAST, _LOGITS // max(logits.shape[1], 1)))


class Workspace:
    """Memory that is reused for every chunk, since new pages cost more than the computation."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def like(self, tensor: Tensor, name: str) -> Tensor:
        """Return uninitialised memory of a tensor's shape; reuses the memory of the same name."""
        found = self._tensors.get(name)
        if found is None or len(found) < len(tensor):
            found = self._tensors[name] = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        return found[: len(tensor)]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Logits of N positions, padded with -inf (probability 0) to V' = 64 M classes."""

    logits: Tensor
    """(N, V') float32, or float64 if the input is."""
    peaks: Tensor
    """(N, M): the largest logit of each block."""
    peak: Tensor
    """(N,): the largest logit of each position."""
    best: Tensor
    """(N,) int64: the first class with this logit."""
    workspace: Workspace

    @classmethod
    def of(cls, logits: Tensor, workspace: Workspace) -> Blocks:
        """Make blocks from (N, V) logits of any float type.

        All chunks that share a workspace have the same V and type.
        """
        wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        missing = -wide.shape[1] % BLOCK
        padded = torch.nn.functional.pad(wide, (0, missing), value=-torch.inf) if missing else wide
        peaks = in_blocks(padded).amax(-1)
        peak, block = peaks.max(-1)  # the first of equal values
        every = torch.arange(len(peak), device=peak.device)
        return cls(padded, peaks, peak, block * BLOCK + in_blocks(padded)[every, block].argmax(-1), workspace)

    def probabilities(self, temperature: float = 1.0) -> Tensor:
        """Return (N, V') softmax(z / T), in a workspace that the next call overwrites."""
        scaled = self.logits
        if temperature != 1.0:
            scaled = torch.mul(self.logits, 1 / temperature, out=self.workspace.like(self.logits, "scaled"))
        return torch.softmax(scaled, -1, out=self.workspace.like(self.logits, "probabilities"))

    def mean(self, probabilities: Tensor) -> Tensor:
        """Return (N,) float64: the mean logit under (N, V') probabilities.

        The product 0 * -inf counts as 0.
        """
        product = torch.mul(probabilities, self.logits, out=self.workspace.like(self.logits, "scaled"))
        mean = block_sums(product).sum(-1)
        if bool(mean.isnan().any()):
            mean = block_sums(product.nan_to_num_(nan=0.0)).sum(-1)
        return mean

    def largest(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest logits of each position, (N, k), descending, and their classes.

        They are in the k blocks with the largest peaks.
        """
        if self.peaks.shape[1] <= k:
            values, ids = self.logits.topk(min(k, self.logits.shape[1]), dim=-1)
            return values, ids
        # (N, k) blocks, ascending
        among = self.peaks.topk(k, dim=-1, sorted=False).indices.sort(-1).values
        every = torch.arange(len(among), device=among.device)[:, None]
        values, where = in_blocks(self.logits)[every, among].flatten(1).topk(k, dim=-1)
        return values, among.gather(1, where // BLOCK) * BLOCK + where % BLOCK


def in_blocks(values: Tensor) -> Tensor:
    """Reshape (N, V') to (N, M, 64), as a view."""
    return values.view(len(values), -1, BLOCK)


def block_sums(values: Tensor) -> Tensor:
    """Sum (N, V') over blocks to (N, M) float64.

    The 64 values of a block are summed in their own precision; only sums over thousands of classes
    need more.
    """
    return in_blocks(values).sum(-1).double()
