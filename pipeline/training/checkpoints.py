"""The checkpoints that an unfinished run has left: whole or torn, of this run or of another."""

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

#: What shapes the course of a run: a run that goes on unasked has the same, one that goes on with
#: `--resume` may have others.
_COURSE = (
    *("num_train_epochs", "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16"),
    *("neftune_noise_alpha", "seed", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)


def course(args: TrainingArguments, **more: Any) -> dict[str, Any]:
    """The settings of transformers that shape the course of a run, and `more`."""
    settings = args.to_dict()
    return {**{name: settings[name] for name in _COURSE}, **more}


def rows_per_step(args: TrainingArguments) -> int:
    """Rows between two steps of the optimizer, over all ranks and accumulated batches."""
    rows: int = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    return rows


def whole_checkpoint(output: Path, file: str, origin: Any, *, resume: bool | None = None) -> str | None:
    """The newest whole checkpoint of a run; None: there is none.

    Trainer writes a checkpoint's state last.

    Args:
        file: where the run keeps its origin: the name of a file in `output`.
        origin: a record of what decides the run, with a field `course`.
        resume: `--resume`, which takes a run of another course too; None: the command has no such
            flag, and weights without a checkpoint give way where the same run has left them.

    Raises:
        ContractError: the checkpoints are of another run or, without `resume`, of another course;
            one holds weights alone.
    """
    found = sorted(checkpoints(output), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    begun = bool(found) or (resume is None and bool(model_files(output)))
    if begun and (output / file).is_file():
        _check_origin(output, parse(type(origin), output / file), origin, resume)
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s: was not written to its end; going back to the one before", path)
            continue
        _check_optimizer(path, resume)
        if not resume:
            logger.info("%s: goes on from %s, which the same run has left", output, path.name)
        return str(path)
    return None


def tell_of_new_start(output: Path, *, resume: bool = False) -> None:
    """Say that nothing of a run can be gone on from, where that is not plain."""
    if resume or checkpoints(output):
        logger.warning("%s: no whole checkpoint to resume from; starting anew", output)


def _check_origin(output: Path, kept: Any, origin: Any, resume: bool | None) -> None:
    """Refuse checkpoints of another run; `resume` takes those of another course."""
    plain = (dataclasses.replace(kept, course=None), dataclasses.replace(origin, course=None))
    first = next(differences(*plain), None)
    if first is not None and resume:
        raise ContractError(
            f"{output}: --resume: the checkpoints are of another run: {first}; use another --output, or train anew with --overwrite in place of --resume"
        )
    other = None if resume or kept.course is None else next(differences(kept.course, origin.course, "course"), None)
    if first or other:
        again = "--resume to go on from them all the same, " if first is None and resume is not None else ""
        raise ContractError(
            f"{output}: holds the {'checkpoints' if checkpoints(output) else 'weights'} of another run that is not finished: {first or other}; "
            f"use another --output, the same settings as before, {again}or --overwrite to train anew"
        )


def _check_optimizer(checkpoint: Path, resume: bool | None) -> None:
    """Refuse to go on from weights alone: a new optimizer would go on with none of what the old one knew."""
    # Trainer writes optimizer.pt, FSDP optimizer.bin or optimizer_0, DeepSpeed global_step*.
    if not any(checkpoint.glob("optimizer*")) and not any(checkpoint.glob("global_step*")):
        before, after = ("--resume: ", " in place of --resume") if resume else ("", "")
        raise ContractError(
            f"{checkpoint}: {before}expected the optimizer's state, found weights alone, as save_only_model keeps them; "
            f"train anew with --overwrite{after}, and without save_only_model"
        )
