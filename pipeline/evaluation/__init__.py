"""Evaluate students against their teacher, from the cache alone."""

from pipeline.evaluation.evaluate import evaluate, run
from pipeline.evaluation.table import format_table

__all__ = ["evaluate", "format_table", "run"]
