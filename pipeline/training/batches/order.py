"""The order of training: a function of (seed, epoch, cache_id) and the batch size alone, the same for any number of ranks and workers.

Row groups are shuffled and dealt to lanes. A lane takes a window of its row groups at a time and
shuffles the rows in it; lanes are interleaved, a row of each in turn. The sequence is cut into
global batches, and a rank takes from each the rows of the lanes it owns, so that ranks decode
different row groups, and hold no more than the open windows of their lanes.

With a token budget, a lane's window is sorted by length first and cut into batches, so that padding
is small; then a lane gives a batch in turn, and each rank takes one. Windows are then the same in
every epoch, and so is the number of batches, as Trainer takes for granted. Where the rows of lists
are compared with each other, batches are made of whole lists in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized

import numpy as np
from torch.utils.data import Sampler

from pipeline.cache import CacheDataset
from pipeline.training.batches.ahead import look_ahead

#: Row groups that are open at once: what one rank alone holds decoded.
OPEN = 64
#: Of these, how many a lane mixes: with a token budget several, so that it has rows of like length
#: to choose from.
_WINDOW, _WINDOW_BY_LENGTH = 1, 4

Batch = list[int]
Item = tuple[int, Batch]
"""The lane, and what it gives in one turn: a row, or a batch of rows."""


def open_groups(world_size: int, *, in_batches: bool = False) -> int:
    """Row groups that a rank holds decoded.

    Args:
        in_batches: lanes give batches, not rows.

    Where the lanes cannot be shared out evenly, a rank also gets rows of others' lanes: it then
    holds all that are open, so as to decode none twice.
    """
    lanes = OPEN // _window(in_batches)
    return OPEN // world_size if lanes % world_size == 0 else OPEN + OPEN // 4


def _window(in_batches: bool) -> int:
    return _WINDOW_BY_LENGTH if in_batches else _WINDOW


class BatchOrder(Sampler[Batch]):
    """Batches of row numbers for one rank.

    `~row` is a row that weighs nothing: the share of a rank that would have none in the last step.
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
        """What is ordered, and for whom.

        Args:
            batch_size: rows of a rank's batch; with `batch_tokens` the most.
            keep: (rows,) bool, the rows to train on, or what gives as many of them for each epoch;
                None: all.
            lengths: (rows,) tokens of each row, for `batch_tokens`.
            batch_tokens: tokens of a rank's batch, padding included.
            lists: (rows,) integers, the list of each row: those of one list stand together and come
                in one batch, as far as it holds them.
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
        """Trainer tells the epoch to the sampler inside the loader's batch sampler: this one is both."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Which order the next iteration gives."""
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
        """What each rank gets in each step."""
        share = 1 if self.in_batches else self.batch_size  # items of a rank in a step
        for items in _cut(self.items(), share * self.world_size):
            dealt = deal([lane for lane, _ in items], share, self.world_size)
            yield [[row for i in mine for row in items[i][1]] for mine in dealt]

    def items(self) -> Iterator[Item]:
        """The global sequence of this epoch: the lanes in turn, until the last has nothing left."""
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
        """The row groups of each lane, in its order."""
        count = len(self.dataset.starts) - 1
        if not self.shuffle:
            return [np.arange(count)]
        groups = self._rng(0 if self.in_batches else self.epoch).permutation(count)
        window = _window(self.in_batches)
        lanes = min(OPEN // window, max(1, count // window))
        return [groups[lane::lanes] for lane in range(lanes)]

    def _kept(self) -> np.ndarray | None:
        """The rows of this epoch."""
        return _kept(self.keep, self.epoch)

    def _lane(self, groups: np.ndarray, keep: np.ndarray | None) -> Iterator[Batch]:
        """What one lane gives."""
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
            )  # a list that goes on in the next row group stays whole
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
    """How many rows an epoch takes: as many in each."""
    kept = _kept(keep, epoch)
    return len(dataset) if kept is None else int(kept.sum())


def by_length(rows: np.ndarray, lengths: np.ndarray, most_rows: int, most_tokens: int) -> list[Batch]:
    """Rows of similar length together: batches of at most so many rows, and so many tokens with padding, or of one row."""
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
    """Whole lists together in batches of at most so many rows.

    A longer list is divided evenly, into other parts in every epoch.

    Args:
        rows: (R,) row numbers, those of one list next to each other.
        lists: (R,) the list of each.
        rng: which lists share a batch, and the order of the batches, is drawn; rows that are a list
            by themselves, and teach nothing, are left out. None: all lists stay in order.

    The number of batches is a matter of the lists' lengths alone: the longest come first, and a
    batch is closed when the next does not fit.
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
    """Deal items to ranks, at most `share` each: those of its own lanes first, then what others cannot hold.

    Args:
        lanes: the lane of each item; rank r owns the lanes l with l mod world_size = r.

    Returns:
        For each rank the numbers of its items, rising.
    """
    hands: list[list[int]] = [[] for _ in range(world_size)]
    over = []
    for i, lane in enumerate(lanes):
        hand = hands[lane % world_size]
        if len(hand) < share:
            hand.append(i)
        else:
            over.append(i)
    fair = -(-len(lanes) // world_size)  # a short last step is shared out too
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
