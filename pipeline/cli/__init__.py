"""The command line: click options -> configuration -> one call of the public API."""

from pipeline.cli import (  # noqa: F401 - each adds its commands
    caches,
    capture,
    evaluation,
    generation,
    init,
    report,
    run,
    sharing,
    students,
    training,
    transforms,
)
from pipeline.cli.commands import FUNCTIONS, main

__all__ = ["FUNCTIONS", "main"]
