"""Tasks whose models give scores to texts: regressions, and rankings of lists."""

from pipeline.tasks.scores.texts import RANKING, ScoredTexts

__all__ = ["RANKING", "ScoredTexts"]
