"""Verbosity and progress bars of other libraries."""

from __future__ import annotations

import logging
import os

from pipeline.verbosity import level


def quiet_libraries() -> None:
    """Hide the progress bars and logs of transformers and datasets, except errors.

    With `--verbose` their INFO logs are shown. TRANSFORMERS_VERBOSITY and DATASETS_VERBOSITY take
    precedence for their library.
    """
    import datasets
    import transformers

    shown = logging.INFO if level() <= logging.DEBUG else max(level(), logging.ERROR)
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers.logging.set_verbosity(shown)
    if level() <= logging.DEBUG and "DATASETS_VERBOSITY" not in os.environ:
        datasets.logging.set_verbosity(shown)
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
