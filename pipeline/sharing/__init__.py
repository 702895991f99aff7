"""Publish, download and import caches."""

from pipeline.sharing.importers import import_responses

__all__ = ["import_responses"]
