"""Configuration of sweep."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config.options import (
    check_positive,
    data_option,
    loss_option,
    model_option,
    output_option,
    training_option,
)
from pipeline.errors import MisuseError
from pipeline.records import DIVERGENCE_KINDS, Divergence, Loss


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """Train every combination of students, losses and seeds, and rank them."""

    cache: tuple[str, ...] = data_option(
        "Directory of the cache, or NAME=DIR; repeat for several, whose rows are the same and whose teachers differ."
    )
    student: tuple[str, ...] = model_option(
        "Name or path of a student to begin from, or NAME=DIR; repeat for several.", ()
    )
    teacher: str | None = model_option(
        "With --shape and --layers: name or path of the teacher that students are made from.", None
    )
    shape: tuple[str, ...] = model_option(
        "LAYERSxWIDTHxHEADS, as 2x128x2, of a student with random weights (others with each seed); repeat for several.",
        (),
    )
    layers: tuple[str, ...] = model_option(
        "I,J,...: layers of the teacher that a student copies, from 0; repeat for several.", ()
    )
    temperature: tuple[float, ...] = loss_option(
        "Temperature; repeat for several. Default: as train-student's, for the cache and task.", ()
    )
    weights: tuple[str, ...] = loss_option(
        "HARD/SOFT, as 0.1/0.9: the two weights of the loss; repeat for several.", ("0.5/0.5",)
    )
    divergence: tuple[Divergence, ...] = loss_option(
        "What is minimised between teacher and student; repeat for several.", ("forward-kl",)
    )
    seed: tuple[int, ...] = training_option(
        "Seed of random weights, order and dropout; repeat for several, which are grouped.", (0,)
    )
    controls: bool = loss_option(
        "Train each student also on the hard labels alone (on the first cache), and on the teacher's hard predictions.",
        True,
    )
    split: str = data_option("Split to train on.", "train")
    eval_split: str | None = data_option("Split that the best is chosen on. Default: validation.", None)
    report_split: str = data_option("Split that is reported in the end; nothing is chosen on it.", "test")
    tail_policy: Literal["ghost", "renormalize", "ignore"] = loss_option(
        "The teacher's mass outside the kept classes (top-k, top-p).", "ghost"
    )
    epochs: float | None = training_option("Passes over the split. Default: as train-student's.", None)
    max_steps: int | None = training_option("Optimizer steps; overrides --epochs where positive.", None)
    learning_rate: float | None = training_option(
        "Peak learning rate. Default: as train-student's, for each student.", None
    )
    batch_size: int | None = training_option("Rows per device and step. Default: as train-student's.", None)
    batch_tokens: int | None = training_option(
        "As train-student's: group rows by length, with so many tokens a batch.", None
    )
    output: str = output_option("Directory of the students, sweep.json and the report.")
    json: bool = output_option("Print sweep.json instead of a table.", False)
    report_to: tuple[str, ...] = training_option(
        "Report losses and metrics to tensorboard, wandb, trackio, ... as transformers has it; all: to what is installed; repeat for several. Default: none.",
        (),
    )
    training: dict[str, Any] = training_option("Any field of transformers.TrainingArguments.", {})

    def __post_init__(self) -> None:
        if not self.cache:
            raise MisuseError("--cache: expected at least one directory")
        if not (self.student or self.shape or self.layers):
            raise MisuseError("give a student: --student, or --shape or --layers with --teacher")
        if (self.shape or self.layers) and self.teacher is None:
            raise MisuseError("--shape and --layers need --teacher, which students are made from")
        if self.teacher is not None and not (self.shape or self.layers):
            raise MisuseError("--teacher goes with --shape and --layers; a --student is trained from the cache alone")
        for name in ("weights", "divergence", "seed"):
            if not getattr(self, name):
                raise MisuseError(f"--{name}: expected at least one")
        for text in self.shape:
            parse_shape(text)
        for text in self.layers:
            parse_layers(text)
        self.losses  # noqa: B018 - checks weights and temperatures
        check_positive("--batch-size", self.batch_size)
        check_positive("--batch-tokens", self.batch_tokens)

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The distinct losses among all combinations of weights, divergences and temperatures.

        Divergence and temperature have no effect without a soft term, and temperature has none on
        a divergence without one; such combinations occur once.
        """
        found = []
        for text in self.weights:
            hard, soft = parse_weights(text)
            for kind in self.divergence:
                for temperature in self.temperature or (None,):
                    plain = Loss(hard, soft, temperature, kind, self.tail_policy)
                    if not soft:  # Adam is invariant to the scale of a loss with a single term
                        plain = Loss(1.0, 0.0)
                    elif not DIVERGENCE_KINDS[kind].power:
                        plain = Loss(hard, soft, 1.0, kind, self.tail_policy)
                    found.append(plain)
        return tuple(dict.fromkeys(found))


def parse_weights(text: str) -> tuple[float, float]:
    """Parse the two weights of `HARD/SOFT`.

    Raises:
        MisuseError: the text has another form.
    """
    try:
        hard, soft = map(float, text.split("/"))
    except ValueError:
        raise MisuseError(f"--weights: expected HARD/SOFT, as 0.1/0.9, found {text!r}") from None
    return hard, soft


def parse_shape(text: str) -> tuple[int, int, int]:
    """Parse `LAYERSxWIDTHxHEADS`.

    Raises:
        MisuseError: the text has another form.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise MisuseError(f"--shape: expected LAYERSxWIDTHxHEADS, as 2x128x2, found {text!r}")
    return int(found[1]), int(found[2]), int(found[3])


def parse_layers(text: str) -> tuple[int, ...]:
    """Parse the numbers of layers `I,J,...`.

    Raises:
        MisuseError: the text has another form.
    """
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise MisuseError(f"--layers: expected numbers of layers, as 0,2,5, found {text!r}")
    return tuple(map(int, text.split(",")))
