"""Make a cache from other caches: merge, filter, convert.

Each transform writes a new verified cache, with one shard for each input shard. Its manifest names
the caches that it was made from.
"""

from pipeline.cache.transforms.convert import convert
from pipeline.cache.transforms.filter import filter_rows
from pipeline.cache.transforms.merge import merge

__all__ = ["convert", "filter_rows", "merge"]
