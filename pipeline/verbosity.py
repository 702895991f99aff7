"""The log level on standard error, and the flags `--quiet` and `--verbose`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from pipeline.errors import MisuseError

#: As transformers and the standard library name them, from the most to the least that is said.
LEVELS = ("debug", "info", "warning", "error", "critical")
#: The level of this process; workers are given their parent's.
_current = "info"


def level_name() -> str:
    """The level of this process."""
    return _current


def level() -> int:
    """The level of this process, as a number of `logging`."""
    return logging.getLevelNamesMapping()[_current.upper()]


def shows_progress() -> bool:
    """Whether bars, and lines in the place of bars, are shown."""
    return level() <= logging.INFO


def set_level(name: str) -> None:
    """Set the level of this package's logs.

    With `debug`, the information of other libraries is shown too.
    """
    global _current
    _current = name
    logging.getLogger("pipeline").setLevel(level())
    logging.getLogger().setLevel(_level_of_others())


@contextlib.contextmanager
def at_level(name: str) -> Iterator[None]:
    """Set the level, and put back what was there."""
    before, root = _current, logging.getLogger().level
    set_level(name)
    try:
        yield
    finally:
        set_level(before)
        logging.getLogger().setLevel(root)


def chosen_level(*, quiet: bool, verbose: bool, names: tuple[str, ...]) -> str:
    """What the flags ask for.

    Args:
        names: of `--log-level`, which may stand before the command and after it.

    Raises:
        MisuseError: flags that contradict each other.
    """
    asked = [*(["--quiet"] if quiet else []), *(["--verbose"] if verbose else [])]
    asked += [f"--log-level {name}" for name in dict.fromkeys(names)]
    if len(asked) > 1:
        raise MisuseError(f"{' and '.join(asked)}: each says how much to print; give one of them")
    return "warning" if quiet else "debug" if verbose else names[0] if names else "info"


def _level_of_others() -> int:
    return logging.INFO if level() <= logging.DEBUG else max(level(), logging.WARNING)
