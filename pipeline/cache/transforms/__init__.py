"""Caches from caches: merge, filter, convert.

Each writes a new verified cache, a shard for each shard, whose manifest names its ancestors.
"""

from pipeline.cache.transforms.convert import convert
from pipeline.cache.transforms.filter import filter_rows
from pipeline.cache.transforms.merge import merge

__all__ = ["convert", "filter_rows", "merge"]
