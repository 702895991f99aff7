"""The engine that makes all shards in this process, and `Capture`, the work of `cache-logits`."""

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
    """Make every outstanding shard in this process; finish the cache if no shard is missing.

    Args:
        part: (index, count): make only this part of the shards.

    Returns:
        The finished cache, or None if shards of other parts are missing.
    """
    cache = make_here(CAPTURE, job, part=part)
    assert cache is None or isinstance(cache, Cache)
    return cache


def make_here(work: Work, job: AnyJob, *, part: tuple[int, int] | None = None) -> Any:
    """Do the same as `capture`, for any `Work`."""
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
    """The work of `softlabel cache-logits`; see `Work`."""

    command: str = "cache-logits"
    speaks: tuple[str, ...] = ("pipeline.capture.head",)

    def open_layout(self, config: CacheLogitsConfig) -> Layout:
        """Open the output, a directory or a URL."""
        return open_layout(config.output)

    def prepare(self, config: CacheLogitsConfig) -> Job:
        """Build the job, including its teacher."""
        return prepare(config)

    def after_the_first(self, config: CacheLogitsConfig) -> CacheLogitsConfig:
        """Return the configuration of later workers: without `overwrite` and `check_with`."""
        return dataclasses.replace(config, overwrite=False, check_with=None)

    def current_plan(self, layout: Layout) -> Plan | None:
        """Return the plan of the existing capture, if any."""
        return current_plan(layout)

    def outstanding(self, layout: Layout, plan: Plan, part: tuple[int, int] | None) -> list[ShardPlan]:
        """Return the shards to make, including damaged shards of a finished cache."""
        return outstanding(layout, plan, part)

    def is_finished(self, layout: Layout, plan: Plan) -> bool:
        """Return whether there is a manifest that lists the shards of all receipts."""
        return is_finished(layout, plan)

    def opened(self, layout: Layout) -> Cache:
        """Open the finished cache."""
        return opened(layout)

    def finish(self, layout: Layout, plan: Plan) -> Cache | None:
        """Write the dataset card and the manifest if no shard is missing."""
        return finish_when_whole(layout, plan)

    def show(self, job: Job, waiting: Sequence[ShardPlan]) -> None:
        """Warn if the disk is too small, and log the first row as tokens."""
        warn_of_full_disk(job, waiting)
        show_first_row(job)

    def check_rows(self, job: Job, waiting: Sequence[ShardPlan]) -> None:
        """Check for token ids without an input embedding."""
        check_rows(job, waiting)

    def check(self, job: Job) -> None:
        """Let the teacher check its predictions on a short row."""
        check_head(job)

    def make(
        self,
        job: Job,
        shards: Iterable[ShardPlan],
        done: Callable[[Receipt], None],
        moved: Callable[[int, int], None],
    ) -> None:
        """Capture the shards: tokenize, run the teacher, encode and write."""
        capture_shards(job, shards, done, moved)


CAPTURE: Work = Capture()
