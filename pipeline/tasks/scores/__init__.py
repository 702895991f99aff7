"""Tasks whose models assign scores to texts: regression and ranking."""

from pipeline.tasks.scores.texts import RANKING, ScoredTexts

__all__ = ["RANKING", "ScoredTexts"]
