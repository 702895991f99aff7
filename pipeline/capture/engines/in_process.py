"""One process that makes every outstanding shard itself; and a capture, as engines see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.cache import Cache, Layout, Plan
from pipeline.cache.writing.build import is_finished, opened
from pipeline.cache.writing.claims import Claims
from pipeline.cache.writing.place import current_plan, open_layout
from pipeline.capture.engines.progress import Tally, already, finish_when_whole, outstanding, progress_of
from pipeline.capture.engines.work import AnyJob, Work
from pipeline.capture.head import check_head, check_rows, show_first_row
from pipeline.capture.job import Job, prepare
from pipeline.capture.shard import capture_shards
from pipeline.capture.space import warn_of_full_disk
from pipeline.config import CacheLogitsConfig
from pipeline.records import Receipt, ShardPlan


def capture(job: Job, *, part: tuple[int, int] | None = None) -> Cache | None:
    """Make every shard (of a part) that is not there yet, in this process; commit where none is missing then."""
    cache = make_here(CAPTURE, job, part=part)
    assert cache is None or isinstance(cache, Cache)
    return cache


def make_here(work: Work, job: AnyJob, *, part: tuple[int, int] | None = None) -> Any:
    """As `capture`, for any work."""
    waiting = work.outstanding(job.layout, job.plan, part)
    if not waiting and work.is_finished(job.layout, job.plan):
        return already(work, job.layout)
    if waiting:
        work.show(job, waiting)
        work.check_rows(job, waiting)
        work.check(job)
    sizes = {shard.name: shard.stop - shard.start for shard in waiting}
    with progress_of(work, job.plan, waiting, part) as progress, Claims(job.layout, job.plan) as claims:
        tally = Tally(progress, sizes)

        def done(receipt: Receipt) -> None:
            claims.release(receipt.plan.name)
            tally.made(0, receipt.plan.name)

        work.make(job, claims.take(waiting), done, partial(tally.moved, 0))
    return work.finish(job.layout, job.plan)


@dataclass(frozen=True, slots=True)
class Capture:
    """See `Work`."""

    command: str = "cache-logits"
    speaks: tuple[str, ...] = ("pipeline.capture.head",)

    def open_layout(self, config: CacheLogitsConfig) -> Layout:
        """A directory, or a URL."""
        return open_layout(config.output)

    def prepare(self, config: CacheLogitsConfig) -> Job:
        """With the teacher."""
        return prepare(config)

    def after_the_first(self, config: CacheLogitsConfig) -> CacheLogitsConfig:
        """Nothing is deleted, and the server is compared no more."""
        return dataclasses.replace(config, overwrite=False, check_with=None)

    def current_plan(self, layout: Layout) -> Plan | None:
        """That of the capture that is there."""
        return current_plan(layout)

    def outstanding(self, layout: Layout, plan: Plan, part: tuple[int, int] | None) -> list[ShardPlan]:
        """Damaged shards of a finished cache too."""
        return outstanding(layout, plan, part)

    def is_finished(self, layout: Layout, plan: Plan) -> bool:
        """By its manifest."""
        return is_finished(layout, plan)

    def opened(self, layout: Layout) -> Cache:
        """The cache."""
        return opened(layout)

    def finish(self, layout: Layout, plan: Plan) -> Cache | None:
        """Write card and manifest."""
        return finish_when_whole(layout, plan)

    def show(self, job: Job, waiting: Sequence[ShardPlan]) -> None:
        """Whether the disk is large enough, and the first row as tokens."""
        warn_of_full_disk(job, waiting)
        show_first_row(job)

    def check_rows(self, job: Job, waiting: Sequence[ShardPlan]) -> None:
        """Token ids without an embedding."""
        check_rows(job, waiting)

    def check(self, job: Job) -> None:
        """The logits of supervised positions against the model's own."""
        check_head(job)

    def make(
        self,
        job: Job,
        shards: Iterable[ShardPlan],
        done: Callable[[Receipt], None],
        moved: Callable[[int, int], None],
    ) -> None:
        """Tokens, teacher, soft labels, Parquet."""
        capture_shards(job, shards, done, moved)


CAPTURE: Work = Capture()
