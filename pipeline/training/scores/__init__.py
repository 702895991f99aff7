"""Losses for students of scores (regression and ranking), and their standardised output layer."""

from pipeline.training.scores.head import standardized
from pipeline.training.scores.labels import ScoreLoss, scale_of_labels
from pipeline.training.scores.loss import BY_GROUP, DIVERGENCES, check_score_loss, score_divergence, score_loss

__all__ = [
    "BY_GROUP",
    "DIVERGENCES",
    "ScoreLoss",
    "check_score_loss",
    "scale_of_labels",
    "score_divergence",
    "score_loss",
    "standardized",
]
