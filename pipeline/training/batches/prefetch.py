"""Decode and collate ahead of the training thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

Item = TypeVar("Item")

#: Batches made ahead: enough to hide a row group that has to be decoded.
_AHEAD = 4


def prefetch(items: Iterator[Item]) -> Generator[Item, None, None]:
    """The same items, made by one thread, a few ahead.

    PyArrow, NumPy and torch release the interpreter for most of it; a process would copy every
    batch. An exception in the thread is raised where its item was due. The thread starts with the
    first item asked for, and ends with the iteration, finished or closed.
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
        except BaseException as error:  # handed over, whatever it is
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
