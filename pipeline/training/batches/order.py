"""The order of training rows: reproducible, and the same for any number of ranks and workers.

It is a function of seed, epoch, cache_id and batch size.

Row groups are shuffled and distributed over lanes. A lane shuffles the rows of a window of its row
groups at a time. The lanes are interleaved, one row of each in turn. The sequence is cut into
global batches, and a rank takes the rows of its own lanes from each batch. Ranks thus decode
different row groups, and hold only the open windows of their lanes.

With a token budget, a lane's window is sorted by length and cut into batches, so that padding is
small. Each lane then gives one batch in turn, and each rank takes one. The windows, and with them
the number of batches, are the same in every epoch, as Trainer requires. If rows of a list are
compared with each other, batches of whole lists are made in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized

import numpy as np
from torch.utils.data import Sampler

from pipeline.cache import CacheDataset
from pipeline.training.batches.ahead import look_ahead

#: Row groups that are open at the same time, over all ranks.
OPEN = 64
#: Row groups in the window of a lane; with a token budget several, for enough rows of similar
#: length.
_WINDOW, _WINDOW_BY_LENGTH = 1, 4

Batch = list[int]
Item = tuple[int, Batch]
"""A lane's number and its output of one turn: a row, or a batch of rows."""


def open_groups(world_size: int, *, in_batches: bool = False) -> int:
    """Return the number of decoded row groups that a rank holds.

    Args:
        in_batches: lanes give batches, not rows.

    If the number of lanes is not a multiple of the ranks, a rank also gets rows of other lanes. It
    then holds all open row groups, to avoid decoding one twice.
    """
    lanes = OPEN // _window(in_batches)
    return OPEN // world_size if lanes % world_size == 0 else OPEN + OPEN // 4


def _window(in_batches: bool) -> int:
    return _WINDOW_BY_LENGTH if in_batches else _WINDOW


class BatchOrder(Sampler[Batch]):
    """Batches of row indices for one rank.

    Index `~row` is a row with weight 0. It fills the batch of a rank that has no row left in the
    last step.
    """

    def __init__(
        self,
        dataset: CacheDataset,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        keep: np.ndarray | Callable[[int], np.ndarray] | None = None,
        lengths: np.ndarray | None = None,
        batch_tokens: int | None = None,
        lists: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Create the order of a data set for one rank.

        Args:
            batch_size: rows per batch and rank; with `batch_tokens` the most rows.
            keep: (rows,) bool: the rows to train on; or a function that returns them for an epoch,
                the same number in each; None: all.
            lengths: (rows,) number of tokens of each row, for `batch_tokens`.
            batch_tokens: tokens per batch and rank, padding included.
            lists: (rows,) integers: the list of each row. Rows of a list are adjacent, and are put
                into one batch if it is large enough.
        """
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.keep = keep
        self.lengths = lengths
        self.batch_tokens = batch_tokens if shuffle else None
        self.lists = lists
        self.in_batches = self.batch_tokens is not None or lists is not None
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._length: int | None = None

    @property
    def batch_sampler(self) -> BatchOrder:
        """This sampler: Trainer calls `set_epoch` on the sampler inside the batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self._length is None:
            if not self.in_batches:
                rows = rows_of_epoch(self.dataset, self.keep, self.epoch)
                self._length = -(-rows // (self.batch_size * self.world_size))
            else:
                self._length = -(-sum(1 for _ in self.items()) // self.world_size)
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        batches = (step[self.rank] or [~next(row for batch in step for row in batch)] for step in self.steps())
        return batches if self.dataset.remote is None else look_ahead(batches, self.dataset)

    def steps(self) -> Iterator[list[Batch]]:
        """Yield the batches of all ranks for each step."""
        share = 1 if self.in_batches else self.batch_size  # items per rank and step
        for items in _cut(self.items(), share * self.world_size):
            dealt = deal([lane for lane, _ in items], share, self.world_size)
            yield [[row for i in mine for row in items[i][1]] for mine in dealt]

    def items(self) -> Iterator[Item]:
        """Yield the global sequence of this epoch: an item of each lane in turn until all end."""
        keep = self._kept()
        lanes = list(enumerate(self._lane(groups, keep) for groups in self._lanes()))
        while lanes:
            alive = []
            for number, lane in lanes:
                item = next(lane, None)
                if item is not None:
                    yield number, item
                    alive.append((number, lane))
            lanes = alive

    def _lanes(self) -> list[np.ndarray]:
        """Return the row groups of each lane, in order."""
        count = len(self.dataset.starts) - 1
        if not self.shuffle:
            return [np.arange(count)]
        groups = self._rng(0 if self.in_batches else self.epoch).permutation(count)
        window = _window(self.in_batches)
        lanes = min(OPEN // window, max(1, count // window))
        return [groups[lane::lanes] for lane in range(lanes)]

    def _kept(self) -> np.ndarray | None:
        """Return (rows,) bool: the rows of this epoch."""
        return _kept(self.keep, self.epoch)

    def _lane(self, groups: np.ndarray, keep: np.ndarray | None) -> Iterator[Batch]:
        """Yield the items of one lane."""
        if not len(groups):
            return
        size = _window(self.in_batches)
        windows = [groups[i : i + size] for i in range(0, len(groups), size)]
        rng = self._rng(self.epoch, int(groups[0]))
        if self.shuffle:
            windows = [windows[i] for i in rng.permutation(len(windows))]
        starts = self.dataset.starts
        for window in windows:
            window = (
                window if self.lists is None else np.sort(window)
            )  # keeps a list together that continues in the next row group
            rows = np.concatenate([np.arange(starts[g], starts[g + 1]) for g in window])
            if keep is not None:
                rows = rows[keep[rows]]
            if self.lists is not None:
                yield from by_list(rows, self.lists[rows], self.batch_size, rng if self.shuffle else None)
                continue
            if self.shuffle:
                rows = rng.permutation(rows)
            if self.batch_tokens is None:
                yield from ([int(row)] for row in rows)
                continue
            assert self.lengths is not None
            batches = by_length(rows, self.lengths[rows], self.batch_size, self.batch_tokens)
            yield from (batches[i] for i in rng.permutation(len(batches)))

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key, int(self.dataset.manifest.cache_id[:16], 16)])


Keep = np.ndarray | Callable[[int], np.ndarray] | None


def _kept(keep: Keep, epoch: int) -> np.ndarray | None:
    return keep(epoch) if callable(keep) else keep


def rows_of_epoch(dataset: Sized, keep: Keep, epoch: int = 0) -> int:
    """Return the number of rows in an epoch, which is the same for every epoch."""
    kept = _kept(keep, epoch)
    return len(dataset) if kept is None else int(kept.sum())


def by_length(rows: np.ndarray, lengths: np.ndarray, most_rows: int, most_tokens: int) -> list[Batch]:
    """Group rows of similar length into batches.

    A batch has at most `most_rows` rows and `most_tokens` tokens including padding, or one row.
    """
    batches: list[Batch] = []
    longest = 0
    for i in np.argsort(-lengths, kind="stable"):
        if batches and len(batches[-1]) < most_rows and (len(batches[-1]) + 1) * longest <= most_tokens:
            batches[-1].append(int(rows[i]))
        else:
            batches.append([int(rows[i])])
            longest = int(lengths[i])
    return batches


def by_list(rows: np.ndarray, lists: np.ndarray, most_rows: int, rng: np.random.Generator | None) -> list[Batch]:
    """Group whole lists into batches of at most `most_rows` rows.

    A longer list is divided evenly, into different parts in every epoch.

    Args:
        rows: (R,) row indices, those of one list adjacent.
        lists: (R,) the list of each row.
        rng: shuffles which lists share a batch, and the order of the batches. Lists of one row are
            then left out, since they have nothing to compare. None: all lists stay in order.

    The number of batches depends on the lengths of the lists only: the longest lists come first,
    and a batch is closed when the next list does not fit.
    """
    cuts = np.flatnonzero(lists[1:] != lists[:-1]) + 1
    found = [part for part in np.split(rows, cuts) if len(part) > 1 or rng is None]
    found = found if rng is None else [rng.permutation(part) if len(part) > most_rows else part for part in found]
    whole = [piece for part in found for piece in np.array_split(part, -(-len(part) // most_rows))]
    if rng is not None:
        whole = [whole[i] for i in rng.permutation(len(whole))]
        whole.sort(key=lambda part: -len(part))  # stable
    batches: list[Batch] = []
    for part in whole:
        if batches and len(batches[-1]) + len(part) <= most_rows:
            batches[-1] += part.tolist()
        else:
            batches.append(part.tolist())
    return batches if rng is None else [batches[i] for i in rng.permutation(len(batches))]


def deal(lanes: Sequence[int], share: int, world_size: int) -> list[list[int]]:
    """Distribute items to ranks, at most `share` each: those of a rank's own lanes first.

    Items that exceed a rank's share go to the ranks with the fewest items.

    Args:
        lanes: the lane of each item; rank r owns the lanes l with l mod world_size = r.

    Returns:
        For each rank the indices of its items, in ascending order.
    """
    hands: list[list[int]] = [[] for _ in range(world_size)]
    over = []
    for i, lane in enumerate(lanes):
        hand = hands[lane % world_size]
        if len(hand) < share:
            hand.append(i)
        else:
            over.append(i)
    fair = -(-len(lanes) // world_size)  # distribute a short last step evenly too
    for hand in hands:
        while len(hand) > fair:
            over.append(hand.pop())
    for i in over:
        min(hands, key=len).append(i)
    return [sorted(hand) for hand in hands]


def _cut(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
