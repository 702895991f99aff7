"""The training order.

Every row occurs once, each step has the same rows for any number of ranks and workers, and training
may resume at any step.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
from torch.utils.data import DataLoader

from pipeline.cache.reading import reader
from pipeline.records import TopK
from pipeline.training.batches.collate import TrainingRows
from pipeline.training.batches.order import OPEN, BatchOrder, by_length, by_list, deal, open_groups
from pipeline.training.batches.prefetch import prefetch
from tests.support.rows import build_cache


class Rows(SimpleNamespace):
    """The attributes of a data set that the order uses: row group starts and the cache's name."""

    def __len__(self) -> int:
        return int(self.starts[-1])


def rows_of(*sizes: int) -> Rows:
    return Rows(starts=np.cumsum([0, *sizes]), manifest=SimpleNamespace(cache_id="a" * 64), remote=None)


LARGE = [37, 5, 64, 64, 64, 1] * 40
SMALL = [20, 20, 7]


def steps(rows, world_size: int, per_step: int, *, epoch: int = 2, **settings) -> list[list[int]]:
    """Return the rows of each step over all ranks."""
    ranks = []
    for rank in range(world_size):
        order = BatchOrder(rows, per_step // world_size, seed=3, rank=rank, world_size=world_size, **settings)
        order.set_epoch(epoch)
        ranks.append(list(order))
        assert len(ranks[-1]) == len(order)
        assert max(map(len, ranks[-1])) <= per_step // world_size
    return [sorted(i for batch in step for i in batch if i >= 0) for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_each_step_holds_the_same_rows_for_any_number_of_ranks(sizes, world_size):
    rows = rows_of(*sizes)
    expected = steps(rows, 1, 16)
    assert sorted(i for step in expected for i in step) == list(range(len(rows)))
    assert steps(rows, world_size, 16) == expected


@pytest.mark.parametrize("world_size", [2, 4])
def test_accumulated_batches_of_one_rank_are_the_batches_of_several(world_size):
    rows = rows_of(*LARGE)
    one = [sorted(batch) for batch in _batches(rows, 4)]
    together = [sorted(i for batch in one[k : k + world_size] for i in batch) for k in range(0, len(one), world_size)]
    assert steps(rows, world_size, 4 * world_size) == together


def _batches(rows, size: int, **settings) -> list[list[int]]:
    order = BatchOrder(rows, size, seed=3, **settings)
    order.set_epoch(2)
    return list(order)


def test_the_order_depends_on_seed_epoch_and_cache():
    rows = rows_of(*LARGE)
    other = rows_of(*LARGE)
    other.manifest = SimpleNamespace(cache_id="b" * 64)
    orders = set()
    for data, seed, epoch in ((rows, 0, 0), (rows, 0, 1), (rows, 1, 0), (other, 0, 0)):
        order = BatchOrder(data, 8, seed=seed)
        order.set_epoch(epoch)
        orders.add(tuple(i for batch in order for i in batch))
        assert list(order) == list(order)
    assert len(orders) == 4


def test_rows_are_well_mixed():
    """Batches of a sorted source mix rows from all of it.

    Rows of a batch are on average as far apart as any two rows.
    """
    rows = rows_of(*LARGE)
    spread = [np.abs(np.diff(batch)).mean() for batch in _batches(rows, 32)[:-1]]
    assert np.mean(spread) == pytest.approx(len(rows) / 3, rel=0.15)


def test_ranks_decode_different_row_groups():
    """Of 240 row groups, only the last ones of unequal lanes are read by two of four ranks."""
    rows = rows_of(*[16] * 240)
    readers: dict[int, set[int]] = {}
    for rank in range(4):
        for batch in BatchOrder(rows, 4, seed=0, rank=rank, world_size=4):
            for row in batch:
                readers.setdefault(row // 16, set()).add(rank)
    assert sum(len(ranks) > 1 for ranks in readers.values()) <= 4


def test_no_more_row_groups_are_open_than_windows_hold():
    """A row group is open from its first row to its last."""
    rows = rows_of(*[16] * 240)
    sequence = [row // 16 for batch in BatchOrder(rows, 8, seed=0) for row in batch]
    last = {group: i for i, group in enumerate(sequence)}
    held: set[int] = set()
    for i, group in enumerate(sequence):
        held.add(group)
        assert len(held) <= OPEN
        if last[group] == i:
            held.remove(group)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_token_budget_keeps_padding_small_and_loses_nothing(world_size):
    rows = rows_of(*LARGE)
    lengths = np.random.default_rng(0).integers(5, 200, len(rows))
    settings = {"lengths": lengths, "batch_tokens": 1000}
    ranks = [
        list(BatchOrder(rows, 64, seed=1, rank=rank, world_size=world_size, **settings)) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(BatchOrder(rows, 64, seed=1, world_size=world_size, **settings)) == len(ranks[0])
    batches = [batch for batches in ranks for batch in batches if batch[0] >= 0]
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    padded = [max(lengths[batch]) * len(batch) for batch in batches]
    assert max(padded) <= 1000
    assert sum(padded) < 1.1 * lengths.sum()
    alone = list(BatchOrder(rows, 64, seed=1, **settings))
    assert sorted(map(tuple, alone)) == sorted(map(tuple, batches))


def test_with_a_token_budget_every_epoch_has_as_many_batches_of_other_rows():
    rows = rows_of(*LARGE)
    lengths = np.random.default_rng(0).integers(5, 20, len(rows))
    counts, contents = set(), set()
    for epoch in range(5):
        order = BatchOrder(rows, 64, seed=1, lengths=lengths, batch_tokens=500)
        order.set_epoch(epoch)
        batches = list(order)
        counts.add(len(batches))
        contents.add(frozenset(map(frozenset, batches)))
    assert len(counts) == 1
    assert len(contents) == 5


def test_by_length_ends_a_batch_at_rows_and_at_tokens():
    batches = by_length(np.arange(6), np.asarray([50, 3, 4, 900, 5, 6]), 3, 100)
    assert batches == [[3], [0, 5], [4, 2, 1]]


def test_dealing_gives_each_rank_its_lanes_and_never_too_much():
    assert deal([0, 1, 2, 3], 2, 2) == [[0, 2], [1, 3]]
    assert deal([0, 0, 0, 0], 2, 2) == [[0, 1], [2, 3]]
    assert deal([0], 2, 2) == [[0], []]
    assert sorted(map(len, deal([0, 0, 2, 2, 1], 4, 2))) == [2, 3]


def test_only_the_rows_to_keep():
    rows = rows_of(*SMALL)
    keep = np.arange(len(rows)) % 3 == 0
    found = [i for batch in _batches(rows, 4, keep=keep) for i in batch]
    assert sorted(found) == np.flatnonzero(keep).tolist()


def test_without_shuffling_rows_stand_in_order():
    assert [i for batch in _batches(rows_of(*LARGE), 7, shuffle=False) for i in batch] == list(range(sum(LARGE)))


# ------------------------------------------------------------------------------------- data loaders


@pytest.fixture
def cached(tmp_path, lm_tokenizer):
    return build_cache(tmp_path / "rows", lm_tokenizer, encoding=TopK(2), per_shard=10, shards=12).dataset(
        "train", window=OPEN
    )


def source_rows(rows) -> list[int]:
    return [row.example.source_row for row, _ in rows]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_sequence_does_not_depend_on_workers(cached, workers):
    expected = [cached[i].example.source_row for batch in BatchOrder(cached, 8, seed=0) for i in batch]
    loader = DataLoader(
        TrainingRows(cached), batch_sampler=BatchOrder(cached, 8, seed=0), collate_fn=source_rows, num_workers=workers
    )
    assert [i for batch in loader for i in batch] == expected
    assert [i for batch in prefetch(iter(loader)) for i in batch] == expected


def test_twenty_resume_points_lose_and_repeat_nothing(cached):
    """As in Trainer's resume, the first batches of the order are skipped without being read."""
    from accelerate import skip_first_batches

    def loader():
        return DataLoader(TrainingRows(cached), batch_sampler=BatchOrder(cached, 5, seed=7), collate_fn=source_rows)

    whole = list(loader())
    assert len(whole) == 24
    for point in range(1, 21):
        assert whole[:point] + list(prefetch(iter(skip_first_batches(loader(), point)))) == whole


def test_a_row_group_is_decoded_once_an_epoch_and_dropped_when_it_is_done(cached, monkeypatch):
    decoded = []
    monkeypatch.setattr(reader, "unpack", lambda *args, _plain=reader.unpack: decoded.append(1) or _plain(*args))
    loader = DataLoader(TrainingRows(cached), batch_sampler=BatchOrder(cached, 5, seed=7), collate_fn=source_rows)
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        assert len(list(prefetch(iter(loader)))) == 24
    assert len(decoded) == 2 * 12
    assert not cached._open


def test_an_error_while_prefetching_is_raised_where_its_batch_was_due(cached):
    def refuse_the_second(rows):
        refuse_the_second.seen += 1
        if refuse_the_second.seen == 2:
            raise ValueError("broken")
        return len(rows)

    refuse_the_second.seen = 0
    order = BatchOrder(cached, 5, seed=7)
    batches = prefetch(iter(DataLoader(TrainingRows(cached), batch_sampler=order, collate_fn=refuse_the_second)))
    assert next(batches) == 5
    with pytest.raises(ValueError, match="broken"):
        next(batches)


def test_the_thread_ends_when_the_iteration_is_closed():
    before = threading.active_count()
    endless = prefetch(itertools.count())
    assert [next(endless) for _ in range(3)] == [0, 1, 2]
    assert threading.active_count() == before + 1
    endless.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("world_size", [1, 2, 3, 6, 24, 100])
def test_no_rank_decodes_a_row_group_twice(world_size):
    """Holds also if lanes cannot be shared evenly and ranks get rows of other lanes.

    A stand-in for decoding counts the calls.
    """
    rows = rows_of(*[16] * 320)
    for rank in {0, world_size - 1}:
        held: OrderedDict[int, int] = OrderedDict()
        decoded = 0
        for batch in BatchOrder(rows, 8, seed=0, rank=rank, world_size=world_size):
            for row in batch:
                group = max(row, ~row) // 16
                if group not in held:
                    decoded += 1
                    if len(held) >= open_groups(world_size):
                        held.popitem(last=False)
                    held[group] = 16
                held.move_to_end(group)
                held[group] -= 1
                if not held[group]:
                    del held[group]
        most = 320 // world_size if 64 % world_size == 0 else 320
        assert decoded <= most + 4


def lists_of(count: int, seed: int = 0) -> np.ndarray:
    """Return the list number of each row, for lists of 2 to 9 rows."""
    rng = np.random.default_rng(seed)
    runs = np.repeat(np.arange(count), rng.integers(2, 10, count))
    return runs[:count] * 7919


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("sizes", [SMALL, LARGE])
def test_batches_of_lists_hold_whole_ones_and_every_row_once(sizes, world_size):
    """A list is split only at the end of a row group.

    A row that is then alone in its list is left out. Epochs have the same number of steps and
    combine lists differently.
    """
    rows = rows_of(*sizes)
    lists = lists_of(len(rows))
    first, second = (steps(rows, world_size, 16 * world_size, epoch=epoch, lists=lists) for epoch in (0, 1))
    assert len(first) == len(second)
    assert first != second or len(first) == 1
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    _, piece, counts = np.unique(np.stack([group_of, lists]), axis=1, return_inverse=True, return_counts=True)
    piece = piece.ravel()
    taken = np.flatnonzero(counts[piece] > 1)
    for epoch in (first, second):
        given = sorted(i for step in epoch for i in step)
        assert len(set(given)) == len(given)
        assert set(given) >= set(taken.tolist())
    order = BatchOrder(rows, 16, seed=3, lists=lists)
    where = {row: number for number, batch in enumerate(order) for row in batch}
    for number in np.unique(piece[taken]):
        assert len({where[row] for row in np.flatnonzero(piece == number)}) == 1


def test_a_list_that_is_longer_than_a_batch_is_cut():
    batches = by_list(np.arange(25), np.zeros(25, dtype=np.int64), 10, np.random.default_rng(0))
    assert sorted(map(len, batches)) == [8, 8, 9]
    assert not any(len(batch) == 1 for batch in by_list(np.arange(33), np.zeros(33), 32, np.random.default_rng(0)))


def test_an_evaluation_keeps_the_order_of_the_lists():
    rows = rows_of(10, 10)
    lists = np.repeat(np.arange(5), 4)
    batches = list(BatchOrder(rows, 8, seed=0, shuffle=False, lists=lists))
    assert [row for batch in batches for row in batch] == list(range(20))
    assert all(len(batch) <= 8 for batch in batches)


def test_rows_that_are_left_out_leave_the_rest_of_their_list():
    rows = rows_of(12)
    lists, keep = np.repeat(np.arange(3), 4), np.ones(12, dtype=bool)
    keep[[1, 5, 6, 7]] = False
    batches = list(BatchOrder(rows, 4, seed=0, lists=lists, keep=keep))
    assert sorted(map(sorted, batches)) == [[0, 2, 3], [8, 9, 10, 11]]  # row 4 has no other row to be compared with
