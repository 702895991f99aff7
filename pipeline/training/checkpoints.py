"""Find a checkpoint of an unfinished run, and check that it belongs to this run."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from pipeline.cache.format.manifest import differences, parse
from pipeline.errors import ContractError
from pipeline.models.saved import checkpoints, model_files

logger = logging.getLogger(__name__)

#: The settings that determine the course of a run. A run that resumes automatically must have the
#: same values; a run that resumes with `--resume` may have others.
_COURSE = (
    *("num_train_epochs", "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16"),
    *("neftune_noise_alpha", "seed", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)


def course(args: TrainingArguments, **more: Any) -> dict[str, Any]:
    """Return the TrainingArguments that determine the course of a run, together with `more`."""
    settings = args.to_dict()
    return {**{name: settings[name] for name in _COURSE}, **more}


def rows_per_step(args: TrainingArguments) -> int:
    """Return the rows of one optimizer step, over all ranks and accumulated batches."""
    rows: int = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    return rows


def whole_checkpoint(output: Path, file: str, origin: Any, *, resume: bool | None = None) -> str | None:
    """Return the path of a run's newest complete checkpoint, or None if there is none.

    A checkpoint is complete if its trainer state can be read: Trainer writes that file last.

    Args:
        file: name of the file in `output` that records the run's origin.
        origin: a record of everything that determines the run, with a field `course`.
        resume: `--resume`, which also accepts a run with another `course`. None: the command has no
            such flag; the origin is then also checked where the output holds weights and no
            checkpoint.

    Raises:
        ContractError: the checkpoints are of another run or, without `resume`, of another course;
            or a checkpoint holds weights without an optimizer state.
    """
    found = sorted(checkpoints(output), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    begun = bool(found) or (resume is None and bool(model_files(output)))
    if begun and (output / file).is_file():
        _check_origin(output, parse(type(origin), output / file), origin, resume)
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s: is incomplete; using the checkpoint before it", path)
            continue
        _check_optimizer(path, resume)
        if not resume:
            logger.info("%s: resuming from %s of the same run", output, path.name)
        return str(path)
    return None


def tell_of_new_start(output: Path, file: str, *, resume: bool = False) -> None:
    """Warn that training starts from the beginning, if the user may expect it to resume.

    Args:
        file: name of the file in `output` that a run has written before its first step.
    """
    if resume or checkpoints(output) or (output / file).is_file():
        logger.warning("%s: no complete checkpoint to resume from; training from the beginning", output)


def _check_origin(output: Path, kept: Any, origin: Any, resume: bool | None) -> None:
    """Refuse checkpoints of another run; `resume` accepts those of another course."""
    plain = (dataclasses.replace(kept, course=None), dataclasses.replace(origin, course=None))
    first = next(differences(*plain), None)
    if first is not None and resume:
        raise ContractError(
            f"{output}: --resume: the checkpoints are of another run: {first}; use another --output, or give --overwrite instead of --resume to train from the beginning"
        )
    other = None if resume or kept.course is None else next(differences(kept.course, origin.course, "course"), None)
    if first or other:
        again = "--resume to resume from them anyway, " if first is None and resume is not None else ""
        raise ContractError(
            f"{output}: holds the {'checkpoints' if checkpoints(output) else 'weights'} of another run that is not finished: {first or other}; "
            f"use another --output, the same settings as before, {again}or --overwrite to train again"
        )


def _check_optimizer(checkpoint: Path, resume: bool | None) -> None:
    """Refuse a checkpoint without optimizer state: training would resume with a new optimizer."""
    # Trainer writes optimizer.pt, FSDP optimizer.bin or optimizer_0, DeepSpeed global_step*.
    if not any(checkpoint.glob("optimizer*")) and not any(checkpoint.glob("global_step*")):
        before, after = ("--resume: ", " in place of --resume") if resume else ("", "")
        raise ContractError(
            f"{checkpoint}: {before}expected an optimizer state, found weights only, as save_only_model saves them; "
            f"train again with --overwrite{after}, and without save_only_model"
        )
