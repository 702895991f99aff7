"""Two captures of one plan in one directory share the work: a shard belongs to the process that holds its claim.

A claim is a lock (`flock`) on a small file in `receipts/`, so that the claim of a killed process is free at once. It saves work and keeps two devices
from writing one shard in turns; that a cache is whole does not depend on it (shards and receipts have their names only when they are whole, and of two
manifests one wins). On a disk without locks every process takes every shard.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.cache.commit import full_disk
from pipeline.cache.manifest import Layout, Plan, check_same_contract, load_receipt, parse
from pipeline.cache.writer import file_sha256
from pipeline.errors import ContractError
from pipeline.records import Receipt, ShardPlan

logger = logging.getLogger(__name__)

_PREFIX = ".claim-"
_SECONDS_BETWEEN_LOOKS = 0.2


def claimed(layout: Layout, plan: Plan, shards: Sequence[ShardPlan], *, wait: bool = True) -> Iterator[ShardPlan]:
    """The shards that this process is to make, one after another, each held until the next is asked for.

    Args:
        wait: what others are making comes last, and is waited for; with False it is left to them.

    Those that others have finished meanwhile are left out.

    Raises:
        ContractError: another capture has taken the directory (`--overwrite`).
    """
    ours = _plan_file(layout)
    check_same_contract(plan, parse(Plan, layout.plan), layout.root)
    taken: list[ShardPlan] = []
    for shard in shards:
        with claim(layout, shard.name) as mine:
            if not mine:
                taken.append(shard)
                continue
            _check_plan_file(layout, ours)
            if finished(layout, shard) is None:
                yield shard
    for shard in taken if wait else ():
        with claim(layout, shard.name, wait=True):
            _check_plan_file(layout, ours)
            if finished(layout, shard) is None:
                yield shard
    _check_plan_file(layout, ours)


@contextlib.contextmanager
def claim(layout: Layout, name: str, *, wait: bool = False) -> Iterator[bool]:
    """Hold the claim of one shard. Gives whether it is ours: always, with `wait`.

    Raises:
        ContractError: the directory's capture is gone.
        CacheError: it cannot be written.
    """
    path = layout.receipt(name).with_name(f"{_PREFIX}{name}")
    handle = _lock(path, wait)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)  # before the lock is free: who gets it then sees that the name is gone
            os.close(handle)


def is_claimed(directory: Path) -> bool:
    """Whether a live process holds a claim in a directory of receipts."""
    for path in directory.glob(f"{_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDWR)
            try:
                if not _try_lock(handle):
                    return True
            finally:
                os.close(handle)
    return False


def sweep_claims(layout: Layout) -> None:
    """Remove the claims of killed processes."""
    for path in layout.plan.parent.glob(f"{_PREFIX}*"):
        with claim(layout, path.name.removeprefix(_PREFIX)):
            pass


def finished(layout: Layout, plan: ShardPlan) -> Receipt | None:
    """The receipt of a shard that is whole on disk; None where it is still to be made."""
    receipt = load_receipt(layout, plan.name)
    path = layout.shard(plan.name)
    if receipt is None or receipt.plan != plan:
        return None
    if receipt.shard.rows == 0:
        return receipt
    return receipt if path.is_file() and file_sha256(path) == receipt.shard.sha256 else None


def _lock(path: Path, wait: bool) -> int | None:
    """An open file with the lock on it; None where another has it. Looks again and again rather than blocks, so that Ctrl-C is heard everywhere."""
    told = False
    while True:
        try:
            handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        except FileNotFoundError:
            raise ContractError(
                f"{path.parent.parent}: the capture that was going on here is gone; another command has removed it (--overwrite)"
            ) from None
        except OSError as error:
            raise full_disk(path, error) from error
        if _try_lock(handle):
            if _same_file(handle, path):
                return handle
            os.close(handle)
            continue
        os.close(handle)
        if not wait:
            return None
        if not told:
            logger.info("%s: another process is making it; waiting", path.name.removeprefix(_PREFIX))
            told = True
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return True  # a disk without locks
        raise
    return True


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _plan_file(layout: Layout) -> tuple[int, int] | None:
    try:
        found = layout.plan.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _check_plan_file(layout: Layout, ours: tuple[int, int] | None) -> None:
    if _plan_file(layout) != ours:
        raise ContractError(
            f"{layout.root}: another capture has begun here (--overwrite), and its plan has replaced this one's; use another --output"
        )
