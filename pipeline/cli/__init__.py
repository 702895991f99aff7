"""click options -> configuration -> one call of the public API; nothing else."""

from pipeline.cli import caches, capture, evaluation, report, run, sharing, training  # noqa: F401 - each adds its commands
from pipeline.cli.commands import FUNCTIONS, main

__all__ = ["FUNCTIONS", "main"]
