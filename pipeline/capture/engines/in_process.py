"""One process that makes every outstanding shard itself."""

from __future__ import annotations

from functools import partial

from pipeline.cache import Cache
from pipeline.cache.writing.build import is_finished
from pipeline.cache.writing.claims import Claims
from pipeline.capture.engines.progress import Tally, already, finish_when_whole, outstanding, progress_of
from pipeline.capture.head import check_head, check_rows, show_first_row
from pipeline.capture.job import Job
from pipeline.capture.shard import capture_shards
from pipeline.capture.space import warn_of_full_disk
from pipeline.records import Receipt


def capture(job: Job, *, part: tuple[int, int] | None = None) -> Cache | None:
    """Make every shard (of a part) that is not there yet, in this process; commit where none is missing then."""
    waiting = outstanding(job.layout, job.plan, part)
    if not waiting and is_finished(job.layout, job.plan):
        return already(job.layout)
    if waiting:
        warn_of_full_disk(job, waiting)
        show_first_row(job)
        check_rows(job, waiting)
        check_head(job)
    sizes = {shard.name: shard.stop - shard.start for shard in waiting}
    with progress_of(job.plan, waiting, part) as progress, Claims(job.layout, job.plan) as claims:
        tally = Tally(progress, sizes)

        def done(receipt: Receipt) -> None:
            claims.release(receipt.plan.name)
            tally.made(0, receipt.plan.name)

        capture_shards(job, claims.take(waiting), done, partial(tally.moved, 0))
    return finish_when_whole(job.layout, job.plan)
