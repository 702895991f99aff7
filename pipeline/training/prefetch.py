"""Decode and collate ahead of the training thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

#: Batches made ahead: enough to hide a row group that has to be decoded.
_AHEAD = 4


class PrefetchLoader(DataLoader[Any]):
    """A `DataLoader` without worker processes whose batches are made by one thread, a few ahead.

    PyArrow, NumPy and torch release the interpreter for most of it; a process would copy every batch. An exception in the thread is raised where
    its batch was due. The thread ends with the iteration, finished or not.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch returns its own iterator class
        ready: queue.Queue[tuple[bool, Any]] = queue.Queue(_AHEAD)
        stopped = threading.Event()

        def put(item: tuple[bool, Any]) -> bool:
            while not stopped.is_set():
                try:
                    ready.put(item, timeout=0.1)
                except queue.Full:
                    continue
                return True
            return False

        def work() -> None:
            try:
                for batch in super(PrefetchLoader, self).__iter__():
                    if not put((True, batch)):
                        return
                put((False, None))
            except BaseException as error:  # handed over, whatever it is
                put((False, error))

        thread = threading.Thread(target=work, name="prefetch", daemon=True)
        thread.start()
        try:
            while True:
                more, item = ready.get()
                if not more:
                    if item is not None:
                        raise item
                    return
                yield item
        finally:
            stopped.set()
            thread.join()
