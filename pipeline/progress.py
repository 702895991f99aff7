"""Progress on standard error: a bar on a terminal, else one line every 30 seconds."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from pipeline.verbosity import shows_progress

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

#: Seconds between two lines where standard error is no terminal. A step that ends sooner prints
#: none.
INTERVAL = 30.0
#: Seconds between two readings of the rates beside a bar.
_BAR_INTERVAL = 0.5
_PREFIXES = ("", "k", "M", "G", "T", "P")


class Progress:
    """Counts what is done of a step. A context; several threads may update it."""

    def __init__(
        self,
        name: str,
        total: int | None = None,
        *,
        unit: str = "row",
        initial: int = 0,
        shown: bool = True,
        leave: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin.

        Args:
            total: None: not known, and so there is no estimate of the time that is left.
            unit: `B` is shown as kB, MB, ...
            initial: done before this process began: counted as done, but not in the rate.
            shown: False on all ranks but the first.
            leave: whether the bar stays on the terminal when the step has ended.
            clock: seconds.
        """
        self.name, self.total, self.unit, self.done = name, total, unit, initial
        self._initial, self._more, self._note = initial, dict[str, Any](), ""
        self._clock = clock
        self._started = self._told = clock()
        self._has_told = False
        self._lock = threading.Lock()
        self._shown = shown and shows_progress()
        self._bar = _open_bar(self, leave=leave) if self._shown and sys.stderr.isatty() else None

    def update(self, count: int, *, note: str | None = None, **more: Any) -> None:
        """Count what is done.

        Args:
            count: in the step's unit; below 0 where something that was counted is to be done again.
            note: stands beside the counts until the next one.
            more: counts in other units, whose rates are shown: `tokens=4096`. Tensors are read when
                a rate is.
        """
        with self._lock:
            self.done += count
            for unit, value in more.items():
                self._more[unit] = self._more.get(unit, 0) + value
            self._note = self._note if note is None else note
            now = self._clock()
            if self._bar is not None:
                if now - self._told >= _BAR_INTERVAL:
                    self._bar.set_postfix_str(", ".join(self._details(now, own_rate=False)), refresh=False)
                    self._told = now
                self._bar.update(count)
            elif self._shown and now - self._told >= INTERVAL:
                self._told, self._has_told = now, True
                logger.info("%s", self.line(now))

    def line(self, now: float) -> str:
        """What is printed where there is no terminal."""
        left = self._seconds_left(now)
        return ", ".join([self._counts(), *self._details(now), *([] if left is None else [f"{duration(left)} left"])])

    def close(self) -> None:
        """End the bar; where lines were printed, print how long it took."""
        if self._bar is not None:
            self._bar.close()
        elif self._has_told:
            now = self._clock()
            logger.info("%s", ", ".join([self._counts(), *self._details(now), f"in {duration(now - self._started)}"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._has_told = False  # it has not ended
        self.close()

    def _counts(self) -> str:
        units = "" if self.unit == "B" else f" {self.unit}s"
        done = _amount(self.done, self.unit)
        if self.total is None:
            return f"{self.name}: {done}{units}"
        share = f" ({100 * self.done // self.total}%)" if self.total else ""
        return f"{self.name}: {done} of {_amount(self.total, self.unit)}{units}{share}"

    def _details(self, now: float, *, own_rate: bool = True) -> list[str]:
        """The note and the rates; a step's own only where rows are not counted."""
        seconds = now - self._started
        found = [self._note] if self._note else []
        if seconds <= 0:
            return found
        if own_rate and "rows" not in self._more:
            units = "" if self.unit == "B" else f" {self.unit}s"
            found.append(f"{_amount((self.done - self._initial) / seconds, self.unit)}{units}/s")
        return [*found, *(f"{_amount(float(value) / seconds)} {unit}/s" for unit, value in self._more.items())]

    def _seconds_left(self, now: float) -> float | None:
        made = self.done - self._initial
        if self.total is None or made <= 0 or now <= self._started:
            return None
        return max(self.total - self.done, 0) * (now - self._started) / made


def track(
    items: Iterable[Item],
    name: str,
    total: int | None = None,
    *,
    unit: str = "row",
    stride: int = 1,
    size: Callable[[Item], int] | None = None,
    shown: bool = True,
) -> Iterator[Item]:
    """The same items, counted as they pass. The bar goes at the end.

    Args:
        stride: how many are counted at once: several where one takes microseconds.
        size: what an item counts for; None: 1.
    """
    with Progress(name, total, unit=unit, shown=shown, leave=False) as progress:
        waiting = 0
        for item in items:
            yield item
            waiting += 1 if size is None else size(item)
            if waiting >= stride:
                progress.update(waiting)
                waiting = 0
        progress.update(waiting)


def duration(seconds: float) -> str:
    """`37 s`, `4 min 10 s`, `2 h 5 min`, `3 d 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = whole // 60
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // (24 * 60)} d {minutes // 60 % 24} h"


def size(count: float) -> str:
    """Bytes in decimal units, as `1.2 GB`."""
    power = 0
    while abs(count) >= 999.5 and power < len(_PREFIXES) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {_PREFIXES[power]}B"


def _amount(value: float, unit: str = "") -> str:
    if unit == "B":
        return size(value)
    return f"{value:,.0f}" if isinstance(value, int) or value >= 100 else f"{value:.3g}"


def _open_bar(progress: Progress, *, leave: bool) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=progress.total,
        initial=progress.done,
        unit=progress.unit,
        unit_scale=progress.unit == "B",
        desc=progress.name,
        leave=leave,
        smoothing=0,  # the mean of this run: batches of a shard differ in length by design
        file=sys.stderr,
    )
