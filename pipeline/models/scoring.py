"""Score a model's logits: prediction, confidence and negative log-likelihood of the labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.records import NO_LABEL
from pipeline.tasks import Task


@dataclass(frozen=True, slots=True)
class Scores:
    """Prediction, its probability and the label's negative log-likelihood in nats, (N,) each."""

    predicted: np.ndarray
    confidence: np.ndarray
    nll: np.ndarray


def score_of(task: Task, logits: Tensor, labels: Tensor) -> Scores:
    """Return the `score` of a task's logits.

    For a task whose targets are scores, return the predicted scores, nan, and the squared errors
    (nan where there is no label).
    """
    if task.target != "score":
        return score(logits, labels)
    found = logits[:, 0].float()
    errors = (found - labels.to(found)).double().square()
    return Scores(found.cpu().numpy(), np.full(len(found), np.nan), errors.cpu().numpy())


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Score (N, V) logits against (N,) labels.

    Returns:
        The argmax, its probability, and the negative log-likelihood of the label (nan where there
        is none).
    """
    logprobs = torch.log_softmax(logits.float(), -1)
    best, predicted = logprobs.max(-1)
    nll = -logprobs.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    nll = nll.masked_fill(labels == NO_LABEL, torch.nan)
    return Scores(predicted.cpu().numpy(), best.double().exp().cpu().numpy(), nll.double().cpu().numpy())
