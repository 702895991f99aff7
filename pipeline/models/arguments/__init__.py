"""Settings of `transformers.Trainer`, and the services that a run is reported to."""

from pipeline.models.arguments.reporting import check_installed, own_run
from pipeline.models.arguments.trainer import (
    Seen,
    check_fields,
    hide_token,
    num_ranks,
    show_progress,
    training_arguments,
)

__all__ = [
    "Seen",
    "check_fields",
    "check_installed",
    "hide_token",
    "num_ranks",
    "own_run",
    "show_progress",
    "training_arguments",
]
