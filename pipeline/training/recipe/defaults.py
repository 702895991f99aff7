"""Choose training settings that no flag gives, from the student, the data and the soft labels.

The numbers come from `benchmarks/defaults.py`: four data sets of short texts, students of 4 to 17
million parameters. The reason of a choice states if it was not measured for such a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.models.start import Start
from pipeline.records import Encoding, Full, Loss, Sampled, Score

#: Evaluations without improvement after which training stops, and the approximate number in a run.
PATIENCE, _EVALUATIONS = 5, 20
#: Share of the steps in which the learning rate rises; then it falls linearly to 0.
WARMUP = 0.1
#: A teacher is trained for 3 epochs, or for enough epochs to reach this many steps, up to this many
#: epochs. The key is whether its weights are random.
_TEACHER_STEPS, _TEACHER_EPOCHS = {True: 600, False: 500}, {True: 40, False: 10}


#: Initial weights of a student -> (upper bound on parameters, peak learning rate).
_RATES = {
    "random": ((1e7, 1e-3), (1e8, 3e-4), (math.inf, 1e-4)),
    "trained": ((3e7, 3e-4), (3e8, 1e-4), (math.inf, 5e-5)),
}
#: Language models, or classifiers by their initial weights -> (least steps, most epochs to reach
#: them); a student is trained for at least 3 epochs.
_LEAST_STEPS = {"tokens": (100, 10), "random": (1000, 100), "trained": (500, 100)}
#: All students of the benchmark had fewer parameters than this.
_MEASURED = 2e7


@dataclass(frozen=True, slots=True)
class Situation:
    """The properties of student and data that defaults are chosen by."""

    predicts_tokens: bool
    """Whether the classes are tokens."""
    start: Start
    num_parameters: int
    rows: int
    """Rows of one epoch."""
    encoding: Encoding
    ranks: bool = False
    """Whether scores rank the rows of lists."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One chosen setting with the reason for its value."""

    name: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {self.value}: {self.reason}"


def choose_loss(encoding: Encoding, *, predicts_tokens: bool, ranks: bool = False) -> tuple[Loss, str]:
    """Return the loss and the reason for it."""
    if ranks:
        return Loss(
            0.0, 1.0, divergence="margin-mse"
        ), "a ranking, whose labels are usually on another scale than the teacher's scores"
    if predicts_tokens:
        return Loss(0.5, 0.5), "a language model"
    if isinstance(encoding, Score):
        return Loss(0.1, 0.9, divergence="mse"), "scores; not measured"
    return Loss(0.1, 0.9, _served(encoding, 2.0)), "a classifier"


def _served(encoding: Encoding, wanted: float) -> float | None:
    """Return the temperature nearest to `wanted` that an encoding supports; None: its only one."""
    if isinstance(encoding, Full):
        return wanted
    if isinstance(encoding, Sampled | Score):
        return None
    return min(max(wanted, min(encoding.temperatures)), max(encoding.temperatures))


def choose_batch_size(known: Situation) -> tuple[int, str]:
    """Return the rows per device and step, and the reason."""
    if known.predicts_tokens:
        return 16, "language model"
    return 32, f"{known.rows:,} rows"


def choose_learning_rate(known: Situation) -> tuple[float, str]:
    """Return the peak learning rate and the reason."""
    if known.start == "adapter":
        return 2e-4, "an adapter (Hu et al., 2021); not measured here"
    begun = {"random": "random weights", "layers": "layers copied from the teacher"}.get(
        known.start, "pretrained weights"
    )
    rates = _RATES["random" if known.start == "random" else "trained"]
    rate = next(rate for most, rate in rates if known.num_parameters < most)
    measured = not known.predicts_tokens and known.num_parameters < _MEASURED
    return rate, f"{begun}, {_size(known.num_parameters)}" + ("" if measured else "; not measured for such a model")


def _size(num_parameters: int) -> str:
    return f"{num_parameters / 1e6:.1f}M parameters"


def choose_steps(known: Situation, rows_per_step: int) -> tuple[int, str]:
    """Return the largest number of optimizer steps, and the reason.

    It is three epochs, or more if those are few steps.
    """
    epoch = math.ceil(known.rows / rows_per_step)
    least, passes = _LEAST_STEPS[
        "tokens" if known.predicts_tokens else "random" if known.start == "random" else "trained"
    ]
    steps = max(3 * epoch, min(least, passes * epoch))
    return steps, f"{steps / epoch:.3g} passes over {known.rows:,} rows"


def evaluation_steps(steps: int, eval_rows: int, rows_per_step: int) -> int:
    """Return the number of steps between two evaluations.

    A run has about 20 evaluations, or fewer if they would take more than a sixth of its time.
    Evaluating a row takes about a third of the time of training on it.
    """
    seldom = math.ceil(2 * eval_rows / rows_per_step)
    return max(1, min(max(steps // _EVALUATIONS, seldom), steps // 4))


def choose_teacher_arguments(
    start: Start, num_parameters: int, rows: int, given: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[Choice, ...]]:
    """Return the TrainingArguments for the fine-tuning of a teacher.

    Args:
        rows: labelled rows of one epoch.
        given: values of `learning_rate`, `per_device_train_batch_size`, `num_train_epochs` and
            `max_steps`; None for those that are not given.

    Returns:
        The given values completed by defaults; and the choices that were made.
    """
    found = {name: value for name, value in given.items() if value is not None}
    choices = []
    if "learning_rate" not in found:
        found["learning_rate"], reason = _teacher_rate(start, num_parameters)
        choices.append(Choice("learning rate", f"{found['learning_rate']:g}", reason))
    batch = found.setdefault("per_device_train_batch_size", 16)
    if "num_train_epochs" not in found and "max_steps" not in found:
        epoch = math.ceil(rows / batch)
        new = start == "random"
        epochs = min(max(3, math.ceil(_TEACHER_STEPS[new] / epoch)), _TEACHER_EPOCHS[new])
        found |= {"num_train_epochs": float(epochs), "warmup_steps": WARMUP}
        choices.append(Choice("epochs", str(epochs), f"{rows:,} labelled rows, {epochs * epoch:,} steps of {batch}"))
    return found, tuple(choices)


def _teacher_rate(start: Start, num_parameters: int) -> tuple[float, str]:
    size = _size(num_parameters)
    if start == "random":
        return 1e-3, f"random weights, {size}"
    if start == "adapter":
        return 2e-4, "an adapter"
    small = num_parameters < 50e6
    return (1e-4 if small else 5e-5), f"pretrained weights, {size}" + ("" if small else "; not measured at this size")
