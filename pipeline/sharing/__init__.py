"""Caches that come from elsewhere: importers of what inference servers return."""

from pipeline.sharing.importers import import_responses

__all__ = ["import_responses"]
