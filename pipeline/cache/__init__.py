"""Caches of soft labels on disk or behind URLs: format, reading, writing, transforms, reports."""

from pipeline.cache.format.manifest import Layout, Plan
from pipeline.cache.reading.reader import Cache, CacheDataset
from pipeline.cache.reading.verification import Verification, drop_broken, verify

__all__ = ["Cache", "CacheDataset", "Layout", "Plan", "Verification", "drop_broken", "verify"]
