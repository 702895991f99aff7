"""The order of training: a function of (seed, epoch, cache_id) alone, the same for any number of ranks and workers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from pipeline.cache import CacheDataset


class BatchOrder(Sampler[list[int]]):
    """Batches of row numbers for one rank.

    Row groups are shuffled, and rows within windows of as many row groups as the reader holds, so every row group is decoded once an epoch. The
    sequence of all ranks together is cut into global batches, and each rank takes its part of each. A rank that would have no row in the
    last one gets `~row`: a row that weighs nothing.
    """

    def __init__(
        self,
        dataset: CacheDataset,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        keep: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`keep`: (rows,) bool, the rows to train on; None: all."""
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.keep = keep
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.num_rows = len(dataset) if keep is None else int(keep.sum())

    @property
    def batch_sampler(self) -> BatchOrder:
        """Trainer tells the epoch to the sampler inside the loader's batch sampler: this one is both."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Which order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_rows // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.rows()
        for start in range(0, len(rows), self.batch_size * self.world_size):
            mine = start + self.rank * self.batch_size
            batch = rows[mine : mine + self.batch_size].tolist()
            yield batch or [~int(rows[start])]

    def rows(self) -> np.ndarray:
        """(num_rows,): the global sequence of this epoch."""
        starts = self.dataset.starts
        if not self.shuffle:
            sequence = np.arange(len(self.dataset))
        else:
            rng = np.random.default_rng([self.seed, self.epoch, int(self.dataset.manifest.cache_id[:16], 16)])
            groups = rng.permutation(len(starts) - 1)
            windows = [groups[i : i + self.dataset.window] for i in range(0, len(groups), self.dataset.window)]
            sequence = np.concatenate(
                [rng.permutation(np.concatenate([np.arange(starts[g], starts[g + 1]) for g in w])) for w in windows]
            )
        return sequence if self.keep is None else sequence[self.keep[sequence]]
