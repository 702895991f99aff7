"""Caches that go elsewhere and come from there: push, pull, importers of what inference servers return."""

from pipeline.sharing.importers import import_responses

__all__ = ["import_responses"]
