"""Prompts -> a model that writes -> a data set with a card, whose token ids `cache-logits` reads."""

from pipeline.generation.records import Counts, Generation
from pipeline.generation.run import generate

__all__ = ["Counts", "Generation", "generate"]
