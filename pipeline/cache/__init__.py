"""The on-disk contract: schema, codec, manifest, commit protocol, writer, reader (local and behind URLs), verify, alignment probe, card."""

from pipeline.cache.format.manifest import Layout, Plan
from pipeline.cache.reading.reader import Cache, CacheDataset
from pipeline.cache.reading.verification import Verification, drop_broken, verify

__all__ = ["Cache", "CacheDataset", "Layout", "Plan", "Verification", "drop_broken", "verify"]
