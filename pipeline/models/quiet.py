"""Other libraries' noise."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Their bars and reports would mix with ours; errors still show."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
