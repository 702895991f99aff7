"""Stage 1: run a teacher once over a data set and write its soft labels."""

from pipeline.capture.run import cache_logits, run

__all__ = ["cache_logits", "run"]
