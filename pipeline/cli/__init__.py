"""click options -> configuration -> one call of the public API; nothing else."""

from pipeline.cli import caches, capture, evaluation, run, training, transforms  # noqa: F401 - each adds its commands
from pipeline.cli.commands import FUNCTIONS, main, quiet_libraries

__all__ = ["FUNCTIONS", "main", "quiet_libraries"]
