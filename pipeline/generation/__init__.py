"""Generation of a data set by a language model from prompts; `cache-logits` reads its token ids."""

from pipeline.generation.records import Counts, Generation
from pipeline.generation.run import generate

__all__ = ["Counts", "Generation", "generate"]
