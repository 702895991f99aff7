"""What all engines share: which shards are outstanding, the progress bar, and the commit at the end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from pipeline.cache import Cache, Layout, Plan
from pipeline.cache.format.manifest import load_manifest
from pipeline.cache.writing.build import finish, missing, opened, refresh, withdraw
from pipeline.cache.writing.claims import finished
from pipeline.records import ShardPlan

logger = logging.getLogger(__name__)


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


def shards_of(plan: Plan, part: tuple[int, int] | None) -> Sequence[ShardPlan]:
    """Part I of N: every N-th shard from I on."""
    return plan.shards if part is None else plan.shards[part[0] :: part[1]]


def already(layout: Layout) -> Cache:
    """The cache that was finished before."""
    logger.info("%s is finished already; nothing to do", layout.name)
    return opened(layout)


def finish_when_whole(layout: Layout, plan: Plan) -> Cache | None:
    """Commit, where no shard is missing: whoever finds all receipts does it."""
    absent = missing(layout, plan)
    if absent:
        logger.info(
            "%s: %d of %d shards are still to be made, by other parts", layout.name, len(absent), len(plan.shards)
        )
        return None
    return finish(layout, plan)


def progress_bar(plan: Plan, waiting: Sequence[ShardPlan], part: tuple[int, int] | None = None) -> tqdm[Any]:
    """Source rows, those of finished shards counted already."""
    total, left = (sum(shard.stop - shard.start for shard in shards) for shards in (shards_of(plan, part), waiting))
    return tqdm(total=total, initial=total - left, unit="row", desc="cache-logits", disable=None)
