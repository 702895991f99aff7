"""Functions shared by all engines: outstanding shards, progress, and the final commit."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.cache import Cache, Layout, Plan
from pipeline.cache.format.manifest import AnyPlan, load_manifest
from pipeline.cache.writing.build import finish, missing, refresh, withdraw
from pipeline.cache.writing.claims import finished
from pipeline.capture.engines.work import Work
from pipeline.progress import Progress
from pipeline.records import ShardPlan

logger = logging.getLogger(__name__)

#: Minimum seconds between two messages of a worker to its parent.
_BETWEEN_MESSAGES = 0.5


def outstanding(layout: Layout, plan: Plan, part: tuple[int, int] | None = None) -> list[ShardPlan]:
    """Return the shards of a part that are missing, including damaged shards of a finished cache.

    If shards of a finished cache are damaged, its manifest is deleted.
    """
    refresh(layout)
    waiting = [shard for shard in shards_of(plan, part) if finished(layout, shard) is None]
    is_its_own = plan.parent is None or _cache_id(layout) != plan.parent.cache_id
    if is_its_own:  # during an append, the manifest is that of the cache before it
        withdraw(layout, waiting)
    return waiting


def _cache_id(layout: Layout) -> str | None:
    return load_manifest(layout.root).cache_id if layout.manifest.is_file() else None


def shards_of(plan: AnyPlan, part: tuple[int, int] | None) -> Sequence[ShardPlan]:
    """Return part I of N: every N-th shard, beginning with shard I."""
    return plan.shards if part is None else plan.shards[part[0] :: part[1]]


def already(work: Work, layout: Layout) -> Any:
    """Log that the output is finished, and open it."""
    logger.info("%s is finished already; nothing to do", layout.name)
    return work.opened(layout)


def finish_when_whole(layout: Layout, plan: Plan) -> Cache | None:
    """Write the manifest if every shard has a receipt; any process that finds this may do it."""
    return finish(layout, plan) if is_whole(layout, plan) else None


def is_whole(layout: Layout, plan: AnyPlan) -> bool:
    """Return whether every shard has a receipt; log the number of missing ones."""
    absent = missing(layout, plan)
    if absent:
        logger.info(
            "%s: %d of %d shards are missing; other parts make them", layout.name, len(absent), len(plan.shards)
        )
    return not absent


def progress_of(
    work: Work, plan: AnyPlan, waiting: Sequence[ShardPlan], part: tuple[int, int] | None = None
) -> Progress:
    """Return a progress bar over source rows that starts at the rows of finished shards.

    Logs how many shards an earlier run has finished, if any.
    """
    every = len(shards_of(plan, part))
    if waiting and len(waiting) < every:
        logger.info("%s: %d of %d shards are finished already", work.command, every - len(waiting), every)
    total, left = (sum(shard.stop - shard.start for shard in shards) for shards in (shards_of(plan, part), waiting))
    return Progress(work.command, total, initial=total - left)


@dataclass(slots=True)
class Tally:
    """Progress of several workers; the rows of unfinished shards of dead workers are subtracted."""

    progress: Progress
    sizes: dict[str, int]
    """Shard name -> number of source rows."""
    unfinished: dict[int, int] = field(default_factory=dict)
    """Worker -> rows counted so far of its current shard."""

    def moved(self, worker: int, rows: int, tokens: int) -> None:
        """Count the batches that a worker has run."""
        self.unfinished[worker] = self.unfinished.get(worker, 0) + rows
        self.progress.update(rows, tokens=tokens)

    def made(self, worker: int, name: str) -> None:
        """Count the remaining rows of a finished shard, including rows that were in no batch."""
        self.progress.update(self.sizes[name] - self.unfinished.pop(worker, 0))

    def lost(self, worker: int) -> None:
        """Subtract the rows of the unfinished shard of a worker that has died."""
        self.progress.update(-self.unfinished.pop(worker, 0))


class Throttle:
    """Accumulates a worker's progress, so that it sends few messages instead of one per batch."""

    def __init__(self) -> None:
        self._rows = self._tokens = 0
        self._sent = time.monotonic()

    def add(self, rows: int, tokens: int) -> bool:
        """Add a batch, and return whether a message is due."""
        self._rows += rows
        self._tokens += tokens
        return time.monotonic() - self._sent >= _BETWEEN_MESSAGES

    def drain(self) -> tuple[int, int]:
        """Return the rows and tokens since the last message, and reset them."""
        found = self._rows, self._tokens
        self._rows = self._tokens = 0
        self._sent = time.monotonic()
        return found
