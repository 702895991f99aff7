"""init-student, train-student."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from pipeline import config as cfg
from pipeline.cli.commands import command

if TYPE_CHECKING:
    from pipeline.records import TrainResult


@command(
    "init-student",
    cfg.InitStudentConfig,
    "softlabel init-student --teacher runs/teacher --num-layers 2 --hidden-size 128 --num-heads 2 --output runs/student-init",
)
def _init_student(config: cfg.InitStudentConfig) -> None:
    from pipeline.models.initialize import run

    click.echo(f"student: {run(config)}")


@command(
    "train-student",
    cfg.TrainStudentConfig,
    "softlabel train-student --cache runs/cache --student runs/student-init --output runs/student",
)
def _train_student(config: cfg.TrainStudentConfig) -> None:
    from pipeline.training.run import run

    result = run(config)
    if os.environ.get("RANK", "0") == "0":  # under torchrun every rank comes here
        _echo_training(result)


def _echo_training(result: TrainResult) -> None:
    losses = [
        f"{name} loss {value:.4f}"
        for name, value in (("hard", result.hard_loss), ("soft", result.soft_loss))
        if value is not None
    ]
    click.echo(f"student: {result.output}  " + ", ".join([f"{result.steps} steps in {result.seconds:.0f} s", *losses]))
