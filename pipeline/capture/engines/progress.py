"""What all engines share: which shards are outstanding, the progress, and the commit at the end."""

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

#: Seconds between two messages of a worker to its parent.
_BETWEEN_MESSAGES = 0.5


def outstanding(layout: Layout, plan: Plan, part: tuple[int, int] | None = None) -> list[ShardPlan]:
    """The shards of a part that are still to be made, damaged ones of a finished cache too."""
    refresh(layout)
    waiting = [shard for shard in shards_of(plan, part) if finished(layout, shard) is None]
    is_its_own = plan.parent is None or _cache_id(layout) != plan.parent.cache_id
    if is_its_own:  # while rows are appended, the manifest is that of the cache before, which stands
        withdraw(layout, waiting)
    return waiting


def _cache_id(layout: Layout) -> str | None:
    return load_manifest(layout.root).cache_id if layout.manifest.is_file() else None


def shards_of(plan: AnyPlan, part: tuple[int, int] | None) -> Sequence[ShardPlan]:
    """Part I of N: every N-th shard from I on."""
    return plan.shards if part is None else plan.shards[part[0] :: part[1]]


def already(work: Work, layout: Layout) -> Any:
    """What was finished before."""
    logger.info("%s is finished already; nothing to do", layout.name)
    return work.opened(layout)


def finish_when_whole(layout: Layout, plan: Plan) -> Cache | None:
    """Commit, where no shard is missing: whoever finds all receipts does it."""
    return finish(layout, plan) if is_whole(layout, plan) else None


def is_whole(layout: Layout, plan: AnyPlan) -> bool:
    """Whether every shard has its receipt; says how many have none."""
    absent = missing(layout, plan)
    if absent:
        logger.info(
            "%s: %d of %d shards are still to be made, by other parts", layout.name, len(absent), len(plan.shards)
        )
    return not absent


def progress_of(
    work: Work, plan: AnyPlan, waiting: Sequence[ShardPlan], part: tuple[int, int] | None = None
) -> Progress:
    """Source rows, those of finished shards counted already."""
    total, left = (sum(shard.stop - shard.start for shard in shards) for shards in (shards_of(plan, part), waiting))
    return Progress(work.command, total, initial=total - left)


@dataclass(slots=True)
class Tally:
    """What several workers have done: rows of a shard that its worker does not finish are taken back."""

    progress: Progress
    sizes: dict[str, int]
    """Shard -> its source rows."""
    unfinished: dict[int, int] = field(default_factory=dict)
    """Worker -> rows that are counted of the shard that it makes."""

    def moved(self, worker: int, rows: int, tokens: int) -> None:
        """Some batches of the shard that a worker makes."""
        self.unfinished[worker] = self.unfinished.get(worker, 0) + rows
        self.progress.update(rows, tokens=tokens)

    def made(self, worker: int, name: str) -> None:
        """A shard is made: its other rows, which have no batch, count too."""
        self.progress.update(self.sizes[name] - self.unfinished.pop(worker, 0))

    def lost(self, worker: int) -> None:
        """A worker has died in the middle of a shard."""
        self.progress.update(-self.unfinished.pop(worker, 0))


class Throttle:
    """Gathers what a worker has done, so that it sends a message now and then rather than after every batch."""

    def __init__(self) -> None:
        self._rows = self._tokens = 0
        self._sent = time.monotonic()

    def add(self, rows: int, tokens: int) -> bool:
        """One batch. Gives whether a message is due."""
        self._rows += rows
        self._tokens += tokens
        return time.monotonic() - self._sent >= _BETWEEN_MESSAGES

    def drain(self) -> tuple[int, int]:
        """Rows and tokens since the last message."""
        found = self._rows, self._tokens
        self._rows = self._tokens = 0
        self._sent = time.monotonic()
        return found
