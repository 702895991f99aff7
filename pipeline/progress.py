"""Progress of long steps on standard error: a bar on a terminal, else a line every 30 s."""

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

#: Seconds between two lines if standard error is not a terminal. A shorter step prints none.
INTERVAL = 30.0
#: Seconds between two updates of the rates next to a bar.
_BAR_INTERVAL = 0.5
_PREFIXES = ("", "k", "M", "G", "T", "P")


class Progress:
    """Progress of one step, as a context manager; several threads may update it."""

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
        """Start the step.

        Args:
            name: label of the step.
            total: number of units; None: not known, so no remaining time is estimated.
            unit: name of the counted unit; `B` is shown as kB, MB, ...
            initial: units done before this process began; not included in the rate.
            shown: whether to print; False on all ranks except the first.
            leave: whether the bar stays on the terminal after the step.
            clock: function that returns the time in seconds.
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
        """Add to the count of done units.

        Args:
            count: number of units; negative if counted work must be repeated.
            note: text shown next to the counts until the next note.
            more: counts in other units, whose rates are shown, such as `tokens=4096`. Tensors are
                converted only when a rate is shown.
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
        """The line that is printed without a terminal."""
        left = self._seconds_left(now)
        return ", ".join([self._counts(), *self._details(now), *([] if left is None else [f"{duration(left)} left"])])

    def close(self) -> None:
        """Close the bar; if lines were printed, print the duration."""
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
            self._has_told = False  # the step failed: print no duration
        self.close()

    def _counts(self) -> str:
        units = "" if self.unit == "B" else f" {self.unit}s"
        done = _amount(self.done, self.unit)
        if self.total is None:
            return f"{self.name}: {done}{units}"
        share = f" ({100 * self.done // self.total}%)" if self.total else ""
        return f"{self.name}: {done} of {_amount(self.total, self.unit)}{units}{share}"

    def _details(self, now: float, *, own_rate: bool = True) -> list[str]:
        """The note and the rates; the rate of the step's unit only if `rows` are not counted."""
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
    """Iterate over items and show the progress; the bar is removed at the end.

    Args:
        stride: number of items per update; more than 1 if an item takes microseconds.
        size: function that returns the count of an item; None: 1 per item.
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
    """Format a duration: `37 s`, `4 min 10 s`, `2 h 5 min`, `3 d 4 h`."""
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
    """Format bytes in decimal units, such as `1.2 GB`."""
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
        smoothing=0,  # mean rate of the run; batches of a shard differ in length
        file=sys.stderr,
    )
