"""Evaluate students against their teacher, from the cache alone."""

from pipeline.evaluation.run import evaluate
from pipeline.evaluation.table import format_table

__all__ = ["evaluate", "format_table"]
