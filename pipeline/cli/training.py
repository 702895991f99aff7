"""The commands init-student and train-student."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from pipeline import config as cfg
from pipeline.cli.commands import command

if TYPE_CHECKING:
    from pipeline.records import Outline, TrainResult


@command(
    "init-student",
    cfg.InitStudentConfig,
    "softlabel init-student --teacher runs/teacher --num-layers 2 --hidden-size 128 --num-heads 2 --output runs/student-init",
)
def _init_student(config: cfg.InitStudentConfig) -> None:
    from pipeline.cross_tokenizer.students import run

    made = run(config)
    if made.layers:
        layers = ", ".join(map(str, made.layers))
        copied = f"layers {layers} of its {made.teacher_layers} (from 0), embeddings and head copied from the teacher"
    else:
        copied = f"{made.num_layers} layer{'s' * (made.num_layers != 1)} where the teacher has {made.teacher_layers}, nothing copied: random weights"
    size = f"{made.num_parameters:,} parameters"
    if made.teacher_parameters:
        size += f", {made.num_parameters / made.teacher_parameters:.1%} of the teacher's {made.teacher_parameters:,}"
    click.echo(f"student: {made.path}  {size}; {copied}")
    own = made.vocabulary
    if own is not None:
        origin = ""
        if own.sources is not None:
            origin = f"; of their embeddings {own.num_copied:,} are the teacher's, {own.num_averaged:,} means of those that their bytes are made of, {own.num_unknown:,} the mean of all"
        click.echo(f"  tokenizer: its own, {len(own.tokenizer):,} tokens{origin}")


def _outline_student(config: cfg.TrainStudentConfig) -> Outline:
    from pipeline.outlines.training import outline_student

    return outline_student(config)


@command(
    "train-student",
    cfg.TrainStudentConfig,
    "softlabel train-student --cache runs/cache --student runs/student-init --output runs/student",
    outline=_outline_student,
)
def _train_student(config: cfg.TrainStudentConfig) -> None:
    from pipeline.training.run import run

    result = run(config)
    if os.environ.get("RANK", "0") == "0":  # print once under torchrun
        _echo_training(result)


def _echo_training(result: TrainResult) -> None:
    from pipeline.metrics import on_split

    losses = {"hard loss": result.hard_loss, "soft loss": result.soft_loss, "span loss": result.span_loss}
    known = {name: value for name, value in losses.items() if value is not None}
    trained = on_split(known, str(result.split), result.rows).lstrip()
    most = "" if result.most_steps is None else f" of at most {result.most_steps:,}"
    kept = "" if result.best_step is None else f", the weights of step {result.best_step:,} kept"
    click.echo(f"student: {result.output}  {result.steps:,} steps{most} in {result.seconds:.0f} s{kept}, {trained}")
    if result.eval_split is not None and result.metrics:
        click.echo(f"  {on_split(result.metrics, result.eval_split, result.eval_rows)}")
