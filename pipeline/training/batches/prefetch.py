"""Decode and collate batches in a thread, ahead of the training thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

Item = TypeVar("Item")

#: Batches that are prefetched: enough to hide the time to decode a row group.
_AHEAD = 4


def prefetch(items: Iterator[Item]) -> Generator[Item, None, None]:
    """Yield the same items, computed a few ahead by one thread.

    PyArrow, NumPy and torch release the GIL for most of the work; a process would copy every batch.
    An exception in the thread is raised at the place of its item. The thread starts with the first
    item requested, and ends when the iteration is exhausted or closed.
    """
    ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(_AHEAD)
    stopped = threading.Event()

    def put(item: Item | None, error: BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item, None):
                    return
            put(None, StopIteration())
        except BaseException as error:  # re-raised in the consumer
            put(None, error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]  # without an error there is an item
    finally:
        stopped.set()
        thread.join()
