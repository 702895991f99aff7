"""Tasks whose rows are images."""

from pipeline.tasks.images.classification import ImageClassification

__all__ = ["ImageClassification"]
