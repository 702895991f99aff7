"""State-machine tests: after any sequence of operations, a cache is right or reports its damage.

`CacheMachine` runs captures, kills, damage, verification, repair and reading in random order. It
compares the directory with the files of an undisturbed capture and the set of damaged shards.
`GrowingMachine` appends, kills appends and merges; the manifest determines which of two caches the
directory must hold.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache as once
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from benchmarks.faults import Bench, make_bench, shared_files
from pipeline.cache import Cache, Layout, Plan, drop_broken, verify
from pipeline.cache.format.manifest import parse
from pipeline.cache.storage.commit import temporary_path
from pipeline.cache.storage.crash import POINTS, hooked
from pipeline.cache.transforms import merge
from pipeline.errors import CacheError, ContractError, IntegrityError
from tests.support.profile import examples


class _Killed(BaseException):
    """Simulates the death of the process."""


@once
def bench() -> Bench:
    """The tiny teacher, data and reference capture that all runs share."""
    folder = tempfile.mkdtemp(prefix="machine-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_bench(Path(folder))


@once
def expected() -> dict[str, bytes]:
    return shared_files(bench().whole)


SHARDS = st.sampled_from(["train-00000", "train-00001", "train-00002"])


class CacheMachine(RuleBasedStateMachine):
    """A cache directory under captures, kills, damage, repair and reading."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=bench().folder)) / "cache"
        self.begun = False

    def teardown(self) -> None:
        shutil.rmtree(self.root.parent)

    @property
    def layout(self) -> Layout:
        return Layout(self.root)

    @property
    def finished(self) -> bool:
        return self.layout.manifest.is_file()

    @property
    def damaged(self) -> set[str]:
        """Names of shards that exist or are in the manifest, but differ from the expected bytes."""
        return {
            name.removeprefix("data/").removesuffix(".parquet")
            for name, data in expected().items()
            if name.startswith("data/")
            and (self.finished or (self.root / name).exists())
            and not ((self.root / name).exists() and (self.root / name).read_bytes() == data)
        }

    # ------------------------------------------------------------------------------------- changes

    @rule()
    def capture(self) -> None:
        """A capture replaces missing and damaged files and ends with the reference bytes."""
        bench().capture(self.root)
        self.begun = True
        assert shared_files(self.root) == expected()
        assert not list(self.root.rglob(".*"))

    @rule(point=st.sampled_from(POINTS), time=st.integers(1, 3))
    def kill(self, point: str, time: int) -> None:
        """A capture is killed at a named point and leaves a partial temporary file."""
        left = time

        def hook(name: str) -> None:
            nonlocal left
            left -= name == point
            if left == 0 and name == point:
                raise _Killed

        try:
            with hooked(hook):
                bench().capture(self.root)
        except _Killed:
            orphan = temporary_path(self.layout.data / "train-00001.parquet")
            if self.layout.data.is_dir():
                orphan.write_bytes(b"half")
        self.begun = self.layout.plan.is_file()

    @rule()
    def capture_with_other_settings(self) -> None:
        """A capture with another seed is refused once one has begun."""
        if self.begun:
            before = shared_files(self.root)
            with pytest.raises(ContractError, match=r"holds another capture: contract\.seed"):
                bench().capture(self.root, seed=1)
            assert shared_files(self.root) == before

    @rule(name=SHARDS, place=st.floats(0, 0.999), bit=st.integers(0, 7))
    def flip(self, name: str, place: float, bit: int) -> None:
        path = self.layout.shard(name)
        if path.exists():
            data = bytearray(path.read_bytes())
            if data:
                data[int(place * len(data))] ^= 1 << bit
                path.write_bytes(data)

    @rule(name=SHARDS, share=st.floats(0, 0.999))
    def cut(self, name: str, share: float) -> None:
        path = self.layout.shard(name)
        if path.exists():
            path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    @rule(name=SHARDS)
    def lose(self, name: str) -> None:
        self.layout.shard(name).unlink(missing_ok=True)

    @precondition(lambda self: self.finished)
    @rule()
    def repair(self) -> None:
        """Repair deletes the damaged shards and nothing else."""
        found = verify(self.root)
        damaged = self.damaged
        drop_broken(self.root, found)
        assert set(found.broken) == damaged
        assert self.finished == (not damaged)
        there = {path.stem for path in self.layout.data.glob("[!.]*.parquet")}
        assert there == {"train-00000", "train-00001", "train-00002"} - damaged

    # -------------------------------------------------------------------------------------- checks

    @rule(quick=st.booleans())
    def verify(self, quick: bool) -> None:
        """Verification reports exactly the damaged shards."""
        if not self.finished:
            with pytest.raises(CacheError, match=r"no cache here|was not finished"):
                verify(self.root, quick=quick)
            return
        assert set(verify(self.root, quick=quick).broken) == self.damaged

    @precondition(lambda self: self.finished)
    @rule()
    def read(self) -> None:
        """Reading yields every row once and in order, or raises an error."""
        try:
            rows = [row.example.source_row for row in Cache.open(self.root).dataset("train")]
        except IntegrityError:
            assert self.damaged
        else:
            assert rows == [row.example.source_row for row in Cache.open(bench().whole).dataset("train")]

    @invariant()
    def nothing_unknown_has_a_final_name(self) -> None:
        if self.root.exists():
            assert set(shared_files(self.root)) <= set(expected())

    @invariant()
    def all_but_the_shards_is_as_it_must_be(self) -> None:
        if self.root.exists():
            files = {name: data for name, data in shared_files(self.root).items() if not name.startswith("data/")}
            assert all(expected()[name] == data for name, data in files.items())


#: Numbers of rows of the cache that is appended to and of one that is merged with it. They are not
#: multiples of a shard, so that full and partial shards are combined.
FIRST, OTHER = 30, 45


@once
def first() -> dict[str, bytes]:
    bench().capture(bench().folder / "first", rows=FIRST)
    return shared_files(bench().folder / "first")


@once
def grown() -> dict[str, bytes]:
    root = bench().folder / "grown"
    bench().capture(root, rows=FIRST)
    bench().capture(root, append=True)
    return shared_files(root)


@once
def other() -> Cache:
    bench().capture(bench().folder / "merged-with", rows=OTHER)
    return Cache.open(bench().folder / "merged-with")


def contents(cache: Cache) -> list[int]:
    return sorted(row.content_hash for row in cache.dataset("train"))


class GrowingMachine(RuleBasedStateMachine):
    """A cache directory whose data set has gained rows since the capture."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=bench().folder)) / "cache"
        self.appending = False

    def teardown(self) -> None:
        shutil.rmtree(self.root.parent)

    @property
    def manifest(self) -> bytes | None:
        path = Layout(self.root).manifest
        return path.read_bytes() if path.is_file() else None

    @rule()
    def capture(self) -> None:
        """A capture of the first rows is refused once an append has begun."""
        if self.appending:
            with pytest.raises(ContractError, match=r"holds another capture"):
                bench().capture(self.root, rows=FIRST)
        else:
            bench().capture(self.root, rows=FIRST)
            assert shared_files(self.root) == first()

    @precondition(lambda self: self.manifest is not None)
    @rule(point=st.one_of(st.none(), st.sampled_from(POINTS)), time=st.integers(1, 2))
    def append(self, point: str | None, time: int) -> None:
        """An append, possibly killed, leaves the old cache before its end and the new one after."""
        left = time

        def hook(name: str) -> None:
            nonlocal left
            left -= name == point
            if left == 0 and name == point:
                raise _Killed

        try:
            with hooked(hook):
                bench().capture(self.root, append=True)
        except _Killed:
            pass
        else:
            assert shared_files(self.root) == grown()
        self.appending = len(parse(Plan, Layout(self.root).plan).shards) > len(
            parse(Plan, Layout(bench().folder / "first").plan).shards
        )

    @precondition(lambda self: self.manifest is not None)
    @rule()
    def merge(self) -> None:
        """A merge holds each row content of either cache once."""
        cache = Cache.open(self.root)
        output = self.root.parent / "merged"
        merged = merge([cache.root, other().root], output)
        assert contents(merged) == sorted(set(contents(cache)) | set(contents(other())))
        assert verify(output).problems == ()
        shutil.rmtree(output)

    @invariant()
    def one_of_the_two_caches_is_there_and_whole(self) -> None:
        if self.manifest is not None:
            assert verify(self.root).problems == ()
            files = shared_files(self.root)
            wanted = first() if self.manifest == first()["manifest.json"] else grown()
            assert self.manifest == wanted["manifest.json"]
            shards = {name for name in wanted if name.startswith("data/")}
            assert {name: files[name] for name in shards} == {name: wanted[name] for name in shards}


SETTINGS = settings(
    max_examples=examples(2, 8),
    stateful_step_count=14,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = SETTINGS
TestGrowingMachine = GrowingMachine.TestCase
TestGrowingMachine.settings = settings(SETTINGS, stateful_step_count=10)
