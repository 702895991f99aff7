"""File locks that let several captures share the shards of one cache.

A claim is a lock (`flock`) on a small file in `receipts/`, so that the claim of a killed process is
released at once. Claims avoid duplicate work, and keep two devices from writing the same shard. The
integrity of a cache does not depend on them: shards and receipts get their names only once they are
complete, and of two manifests one wins. On a file system without locks every process makes every
shard.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.cache.format.hashes import file_sha256
from pipeline.cache.format.manifest import AnyPlan, Layout, check_same_contract, load_receipt, parse
from pipeline.cache.storage.commit import full_disk
from pipeline.errors import ContractError
from pipeline.records import Receipt, ShardPlan

logger = logging.getLogger(__name__)

_PREFIX = ".claim-"
_SECONDS_BETWEEN_LOOKS = 0.2


class Claims:
    """The claims that one process holds, as a context manager that releases them at its end."""

    def __init__(self, layout: Layout, plan: AnyPlan) -> None:
        self._layout, self._plan = layout, plan
        self._held: dict[str, int] = {}
        self._stopped = threading.Event()
        self._change = threading.Lock()

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._stopped.set()
        for name in list(self._held):
            self.release(name)

    def take(self, shards: Iterable[ShardPlan]) -> Iterator[ShardPlan]:
        """Yield the shards that this process should make, each claimed until it is released.

        Shards claimed by other processes come last, once their claims are free; finished shards are
        skipped.

        Raises:
            ContractError: another capture has replaced this one (`--overwrite`).
        """
        ours = _plan_file(self._layout)
        found = parse(type(self._plan), self._layout.plan)
        check_same_contract(self._plan, found, self._layout, work=self._layout.names.work)
        taken: list[ShardPlan] = []
        for shard in shards:
            if not self.hold(shard.name):
                taken.append(shard)
                continue
            _check_plan_file(self._layout, ours)
            if finished(self._layout, shard) is None:
                yield shard
            else:
                self.release(shard.name)
        for shard in taken:
            if not self.hold(shard.name, wait=True):
                return  # the context has ended
            _check_plan_file(self._layout, ours)
            if finished(self._layout, shard) is None:
                yield shard
            else:
                self.release(shard.name)
        _check_plan_file(self._layout, ours)

    def hold(self, name: str, *, wait: bool = False) -> bool:
        """Claim one shard, and return whether this process holds the claim.

        With `wait`, it returns False only if the context has ended. Nothing is claimed after the
        context's end: a thread that reads ahead may still call this after the capture has failed.

        Raises:
            ContractError: the capture in this directory was removed.
            CacheError: the directory cannot be written.
        """
        handle = _lock(_path(self._layout, name), wait, self._stopped)
        if handle is None:
            return False
        with self._change:
            self._held[name] = handle
            if not self._stopped.is_set():
                return True
        self.release(name)
        return False

    def release(self, name: str) -> None:
        """Release the claim of one shard, if it is held."""
        handle = self._held.pop(name, None)
        if handle is not None:
            # before the lock is released, so that the next holder sees that the file is gone
            _path(self._layout, name).unlink(missing_ok=True)
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


def sweep_claims(layout: Layout, plan: AnyPlan) -> None:
    """Remove the claim files of killed processes."""
    with Claims(layout, plan) as claims:
        for path in layout.plan.parent.glob(f"{_PREFIX}*"):
            claims.hold(path.name.removeprefix(_PREFIX))


def finished(layout: Layout, plan: ShardPlan) -> Receipt | None:
    """Return the receipt of a complete shard, or None if the shard is still to be made.

    A local shard is hashed. Of a shard behind a URL only the size is compared, since uploads are
    complete or absent.
    """
    receipt = load_receipt(layout, plan.name)
    if receipt is None or receipt.plan != plan:
        return None
    if receipt.shard.rows == 0:
        return receipt
    path = layout.shard(plan.name)
    if layout.outbox is not None:
        whole = layout.outbox.size(f"data/{path.name}") == receipt.shard.bytes
    else:
        whole = path.is_file() and file_sha256(path) == receipt.shard.sha256
    return receipt if whole else None


def _path(layout: Layout, name: str) -> Path:
    return layout.receipt(name).with_name(f"{_PREFIX}{name}")


def _lock(path: Path, wait: bool, stopped: threading.Event) -> int | None:
    """Open and lock a file; None if another process holds the lock.

    With `wait`, it polls until the lock is free or `stopped` is set.
    """
    told = False
    while True:
        try:
            handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        except FileNotFoundError:
            raise ContractError(
                f"{path.parent.parent}: the capture in this directory was removed by another command (--overwrite)"
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
        if stopped.wait(_SECONDS_BETWEEN_LOOKS):
            return None


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return True  # a file system without locks
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
            f"{layout.name}: another capture has begun here (--overwrite), and its plan has replaced this one's; use another --output"
        )
