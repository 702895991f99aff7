"""`--dry-run` of train-student and train-teacher: prepare a run, and describe it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from pipeline.config import TrainStudentConfig, TrainTeacherConfig
from pipeline.progress import size
from pipeline.records import Outline
from pipeline.softlabels.names import encoding_name
from pipeline.training import run as student
from pipeline.training import teacher
from pipeline.training.card import describe_loss
from pipeline.training.saving import SavingTrainer
from pipeline.training.trainer import DistillationTrainer


def outline_student(config: TrainStudentConfig) -> Outline:
    """Describe what `train-student` would do; write nothing.

    Raises:
        PipelineError: as in `run`.
    """
    found = _until_the_first_step(config, partial(student.run, _without_push(config)))
    return (("splits", ", ".join(config.split)), *found)


def outline_teacher(config: TrainTeacherConfig) -> Outline:
    """Describe what `train-teacher` would do, after reading the training rows; write nothing.

    Raises:
        PipelineError: as in `run`.
    """
    return _until_the_first_step(config, partial(teacher.run, _without_push(config)))


def _until_the_first_step(config: TrainStudentConfig | TrainTeacherConfig, run: Callable[..., Any]) -> Outline:
    try:
        run(before_training=partial(_stop, config.output))
    except _StoppedError as stopped:
        return stopped.lines
    raise AssertionError("the run has not been stopped")


class _StoppedError(Exception):
    """Raised instead of the first step, with the description of the run."""

    def __init__(self, lines: Outline) -> None:
        super().__init__()
        self.lines = lines


def _stop(output: str, trainer: SavingTrainer, checkpoint: str | None) -> NoReturn:
    raise _StoppedError(tuple(_lines(output, trainer, checkpoint)))


def _lines(output: str, trainer: SavingTrainer, checkpoint: str | None) -> Iterator[tuple[str, str]]:
    args = trainer.args
    model: Any = trainer.model
    loader: Any = trainer.get_train_dataloader()
    _, per_epoch, _, _, batch, _, steps = trainer.set_initial_training_values(args, loader)
    if isinstance(trainer, DistillationTrainer):
        yield from _of_a_student(trainer)
    else:
        yield "reads", f"train, {len(loader.dataset):,} labelled rows"
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    total, learnt = (sum(p.numel() for p in part) for part in (parameters, trained))
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    yield "model", f"{total:,} parameters, {learnt:,} of them trained; {precision} on {args.device.type}"
    parts = {"ranks": args.world_size, "accumulated batches": args.gradient_accumulation_steps}
    times = "".join(f" x {count} {what}" for what, count in parts.items() if count > 1)
    yield "batch", f"{batch:,} rows a step" + (f" ({args.per_device_train_batch_size}{times})" if times else "")
    done = f", those before {Path(checkpoint).name} are done already" if checkpoint else ""
    yield "steps", f"{steps:,}{done}; {per_epoch:,} an epoch"
    yield "learning rate", f"{args.learning_rate:g}, {_plain(args.lr_scheduler_type)}"
    weights = size(sum(p.numel() * p.element_size() for p in trained))
    yield "writes", f"{output}: about {weights} of weights; checkpoints: {_plain(args.save_strategy)}"
    if args.report_to:
        yield "reports", f"to {', '.join(args.report_to)}, as {args.run_name}"


def _of_a_student(trainer: DistillationTrainer) -> Iterator[tuple[str, str]]:
    cache = trainer.cache
    encoding = cache.manifest.contract.encoding
    yield "reads", f"{cache.where}: {trainer.rows_of_an_epoch:,} rows an epoch, {encoding_name(encoding)}"
    loss = describe_loss(trainer.loss, teacher_labels=trainer.collator.teacher_labels)
    yield "loss", f"{loss}; T = {trainer.temperature:g}"
    during = f"during training: {_plain(trainer.args.eval_strategy)}"
    if trainer.held_out is not None:
        yield "evaluation", f"{trainer.held_out.num_measured:,} rows held out; {during}"
    elif trainer.eval_split is None:
        yield "evaluation", "none"
    else:
        rows = len(cache.dataset(trainer.eval_split))
        yield (
            "evaluation",
            f"{trainer.eval_split}, {rows:,} rows; {during}",
        )


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))


def _without_push(config: Any) -> Any:
    """Disable `push_to_hub`: Trainer would create the repository on construction."""
    return dataclasses.replace(config, training={**config.training, "push_to_hub": False})
