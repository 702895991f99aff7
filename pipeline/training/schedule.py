"""Schedules of the hard and soft loss weights over a training run."""

from __future__ import annotations

import math

from pipeline.records import Loss, Schedule

#: Shares of a warmup-stable-decay run in which a weight rises from 0 and falls to its end value.
_WARMUP, _DECAY = 0.1, 0.2


def weights_of_step(loss: Loss, step: int, num_steps: int) -> tuple[float, float]:
    """Return the (hard, soft) weight of a step, counted from 0.

    The schedule is evaluated at the middle of the step, so that a weight that starts or ends at 0
    is never 0.
    """
    return weights_at(loss, min((step + 0.5) / max(num_steps, 1), 1.0))


def weights_of_evaluation(loss: Loss) -> tuple[float, float]:
    """Return the (hard, soft) weight of evaluations, constant so that they can be compared.

    They are the start weights of the schedule, or its end weights if both start at 0.
    """
    start = (loss.hard_weight, loss.soft_weight)
    return start if any(start) else weights_at(loss, 1.0)


def weights_at(loss: Loss, progress: float) -> tuple[float, float]:
    """Return the (hard, soft) weight after a share of the optimizer steps, in [0, 1]."""
    return (
        _value(loss.schedule, loss.hard_weight, loss.hard_weight_end, progress),
        _value(loss.schedule, loss.soft_weight, loss.soft_weight_end, progress),
    )


def _value(schedule: Schedule, start: float, end: float | None, progress: float) -> float:
    """Return one weight. A constant weight has an end equal to its start."""
    if schedule == "constant":
        return start
    if schedule == "warmup-stable-decay":
        if progress < _WARMUP:
            return start * progress / _WARMUP
        share = max(0.0, (progress - (1 - _DECAY)) / _DECAY)
        return start + ((end or 0.0) - start) * share
    share = progress if schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return start + ((start if end is None else end) - start) * share
