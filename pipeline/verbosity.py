"""The log level of this package, set by `--log-level`, `--quiet` and `--verbose`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from pipeline.errors import MisuseError

#: Names as in transformers and `logging`, from most to least verbose.
LEVELS = ("debug", "info", "warning", "error", "critical")
#: The level of this process; workers receive that of their parent.
_current = "info"


def level_name() -> str:
    """The level of this process."""
    return _current


def level() -> int:
    """The level of this process, as a number of `logging`."""
    return logging.getLevelNamesMapping()[_current.upper()]


def shows_progress() -> bool:
    """Whether progress bars, or lines in their place, are shown."""
    return level() <= logging.INFO


def set_level(name: str) -> None:
    """Set the level of this package's logs.

    With `debug`, messages of other libraries at level `info` are shown too.
    """
    global _current
    _current = name
    logging.getLogger("pipeline").setLevel(level())
    logging.getLogger().setLevel(_level_of_others())


@contextlib.contextmanager
def at_level(name: str) -> Iterator[None]:
    """Set the level within a context, and restore the previous one."""
    before, root = _current, logging.getLogger().level
    set_level(name)
    try:
        yield
    finally:
        set_level(before)
        logging.getLogger().setLevel(root)


def chosen_level(*, quiet: bool, verbose: bool, names: tuple[str, ...]) -> str:
    """The level that the flags select.

    Args:
        names: values of `--log-level`, which may be given before and after the command.

    Raises:
        MisuseError: flags contradict each other.
    """
    asked = [*(["--quiet"] if quiet else []), *(["--verbose"] if verbose else [])]
    asked += [f"--log-level {name}" for name in dict.fromkeys(names)]
    if len(asked) > 1:
        raise MisuseError(f"{' and '.join(asked)}: all of them set how much is printed; give only one")
    return "warning" if quiet else "debug" if verbose else names[0] if names else "info"


def _level_of_others() -> int:
    return logging.INFO if level() <= logging.DEBUG else max(level(), logging.WARNING)
