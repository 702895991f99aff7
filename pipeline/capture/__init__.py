"""Stage 1: run a teacher once over a data set and write its soft labels."""

from pipeline.capture.labelled import LabelledRow
from pipeline.capture.run import cache_logits
from pipeline.capture.write import write_cache

__all__ = ["LabelledRow", "cache_logits", "write_cache"]
