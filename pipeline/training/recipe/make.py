"""Make the recipe of a student's training from flags, with defaults for what they do not give."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.cache import Cache
from pipeline.cache.format.moments import scale_of
from pipeline.config import TrainStudentConfig
from pipeline.models import LoadedModel
from pipeline.models.arguments import num_ranks
from pipeline.models.start import start_of
from pipeline.records import Loss, is_known
from pipeline.tasks import get_task, needs_label_column
from pipeline.training.batches.held_out import FEWEST_ROWS, MOST_ROWS, HeldOut, hold_out, labelled_rows, which_labelled
from pipeline.training.batches.mixing import Mixture
from pipeline.training.recipe.defaults import (
    PATIENCE,
    WARMUP,
    Choice,
    Situation,
    choose_batch_size,
    choose_learning_rate,
    choose_loss,
    choose_steps,
    evaluation_steps,
)
from pipeline.training.scores import BY_GROUP

logger = logging.getLogger(__name__)

#: Fields of the `training:` section that set the length of a run, whether it is evaluated and
#: saved, and how often.
_LENGTH = ("max_steps", "num_train_epochs")
_EVALUATION = ("eval_strategy", "save_strategy", "load_best_model_at_end")
_EVERY = ("eval_steps", "save_steps")


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings that a student is trained with."""

    loss: Loss
    arguments: dict[str, Any]
    """Fields of TrainingArguments; the `training:` section overrides them."""
    early_stopping: int | None
    """Evaluations without improvement after which training ends; None: no early stopping."""
    held_out: HeldOut | None
    choices: tuple[Choice, ...]
    """The settings that no flag gives."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """The rows that are evaluated on during a run; without rows, a run is not stopped early."""

    rows: int
    reason: str
    held_out: HeldOut | None = None


def make_recipe(
    config: TrainStudentConfig, cache: Cache, student: LoadedModel, mixture: Mixture | None, *, loss: Loss | None = None
) -> Recipe:
    """Return the settings of the flags, completed by defaults.

    Args:
        loss: replaces the loss that the flags give.

    Raises:
        CacheError: the cache has no such split.
        TrainingError: only hard labels are trained on, and no row has one.
    """
    cache.dataset(config.split)  # raises CacheError if there is no such split
    known = _situation(config, cache, student, mixture)
    choices: list[Choice] = []
    if loss is None:
        base, reason = choose_loss(known.encoding, predicts_tokens=known.predicts_tokens, ranks=known.ranks)
        loss = config.loss_over(base)
        if loss == base:
            choices.append(Choice("loss", _loss_text(loss), reason))
    if loss.hard_weight and loss.soft_weight:
        _warn_of_units(cache, config.split)
    if loss.divergence in BY_GROUP and "score_group" in cache.manifest.contract.columns and cache.remote is None:
        alone = _rows_alone(cache, config.split)
        if alone:
            choices.append(Choice("lists", f"{alone:,} rows left out", "each is compared with nothing"))
    arguments: dict[str, Any] = {"seed": config.seed, "save_total_limit": 2}
    chosen = {
        "learning_rate": ("learning rate", config.learning_rate, choose_learning_rate(known)),
        "per_device_train_batch_size": ("batch size", config.batch_size, choose_batch_size(known)),
    }
    for field, (name, given, (value, reason)) in chosen.items():
        arguments[field] = value if given is None else given
        if given is None and field not in config.training:
            choices.append(Choice(name, f"{value:g}", reason))
    if config.epochs is not None or config.max_steps is not None or any(name in config.training for name in _LENGTH):
        arguments["num_train_epochs"] = 3.0 if config.epochs is None else config.epochs
        arguments["max_steps"] = -1 if config.max_steps is None else config.max_steps
        if config.early_stopping:
            arguments |= _stop_fields("epoch", None, "loss")
        return Recipe(loss, arguments, config.early_stopping or None, None, tuple(choices))
    rows_per_step = _rows_per_step(config, cache, arguments["per_device_train_batch_size"])
    steps, reason = choose_steps(known, rows_per_step)
    arguments |= {"max_steps": steps, "warmup_steps": WARMUP}
    measured = _measured(config, cache, mixture, loss, steps, rows_per_step)
    metric = "agreement" if _learns_labels(loss) and config.hard_labels == "teacher" else "loss"
    if _learns_labels(loss) and config.hard_labels == "data":
        reason += ", labelled or not, as for a student of the soft labels"
    asked_for = not measured.rows and bool(config.early_stopping)
    choices.append(Choice("steps", f"at most {steps:,}" if measured.rows or asked_for else f"{steps:,}", reason))
    if asked_for:  # without a split to evaluate on, the trainer raises an error
        return Recipe(
            loss, arguments | _stop_fields("epoch", None, metric), config.early_stopping, None, tuple(choices)
        )
    if not measured.rows:
        return Recipe(loss, arguments, None, None, (*choices, Choice("early stopping", "none", measured.reason)))
    given = next((config.training[name] for name in _EVERY if name in config.training), None)
    every, patience = evaluation_steps(steps, measured.rows, rows_per_step), config.early_stopping or PATIENCE
    every = given if isinstance(given, int) else every
    arguments |= _stop_fields("steps", every, metric)
    stop = f"after {patience} evaluations without a better {metric}"
    choices.append(Choice("early stopping", stop, f"every {every:,} steps on {measured.reason}; the best is kept"))
    return Recipe(loss, arguments, patience, measured.held_out, tuple(choices))


def _warn_of_units(cache: Cache, splits: Sequence[str]) -> None:
    """Warn if the data's scores are in another unit than the teacher's.

    A student has one unit, so it cannot learn both.
    """
    scale = scale_of(cache.manifest)
    if scale is None or cache.remote is not None:
        return
    lists = np.stack(
        [row for split in splits for row in cache.dataset(split).column("position_labels")]
    )  # (R, outputs)
    for output, labels in enumerate(lists.T):
        known = labels[is_known(labels)].astype(np.float64)
        mean, std = float(scale.mean[output]), float(scale.std[output])
        if len(known) < FEWEST_ROWS or known.std() == 0:
            continue
        if abs(known.mean() - mean) > std or not 0.5 < known.std() / std < 2:
            logger.warning(
                "%s: output %d: the data's scores (mean %.3g, standard deviation %.3g) are in another unit than the teacher's (mean %.3g, standard deviation %.3g), "
                "so that the hard and the soft term have different targets; give --hard-weight 0, or cache with a teacher that was trained on these",
                *(cache.where, output, known.mean(), known.std(), mean, std),
            )


def _rows_alone(cache: Cache, splits: Sequence[str]) -> int:
    """Return the number of rows whose list has no other row."""
    alone = 0
    for split in splits:
        groups = cache.dataset(split).column("score_group")
        cuts = np.flatnonzero(np.append(True, groups[1:] != groups[:-1]))
        alone += int((np.diff(np.append(cuts, len(groups))) == 1).sum())
    return alone


def _situation(config: TrainStudentConfig, cache: Cache, student: LoadedModel, mixture: Mixture | None) -> Situation:
    contract = cache.manifest.contract
    more = mixture.others if mixture is not None and mixture.kind == "data" else ()
    return Situation(
        predicts_tokens=get_task(contract.task).predicts_tokens,
        ranks=get_task(contract.task).ranks,
        start=start_of(student.model, student.name),
        num_parameters=sum(p.numel() for p in student.model.parameters()),
        rows=sum(_num_rows(each, config.split) for each in (cache, *more)),
        encoding=contract.encoding,
    )


def _rows_per_step(config: TrainStudentConfig, cache: Cache, batch_size: int) -> int:
    """Return the rows of one optimizer step, over all ranks and accumulated batches.

    With a token budget, it is an estimate.
    """
    rows: int = config.training.get("per_device_train_batch_size", batch_size)
    accumulated: int = config.training.get("gradient_accumulation_steps", 1)
    if config.batch_tokens is not None:
        shards = [shard for split in config.split for shard in cache.manifest.split_shards(split)]
        length = sum(shard.tokens for shard in shards) / sum(shard.rows for shard in shards)
        rows = min(rows, max(1, int(config.batch_tokens / length)))
    return rows * accumulated * num_ranks()


def _stop_fields(strategy: str, every: int | None, metric: str) -> dict[str, Any]:
    """Return the TrainingArguments that early stopping and keeping the best checkpoint need."""
    steps = {} if every is None else {"eval_steps": every, "save_steps": every}
    return {
        "eval_strategy": strategy,
        "save_strategy": strategy,
        **steps,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "restore_callback_states_from_checkpoint": True,  # the number of evaluations without improvement
    }


def _measured(
    config: TrainStudentConfig, cache: Cache, mixture: Mixture | None, loss: Loss, steps: int, rows_per_step: int
) -> _Measured:
    """Return the rows to evaluate on: a split, or else rows held out of the training split."""
    if config.early_stopping == 0:
        return _Measured(0, "as --early-stopping 0 says")
    if any(name in config.training for name in _EVALUATION):
        return _Measured(0, "the training: section says when to evaluate and save")
    task = get_task(cache.manifest.contract.task)
    needs_labels = _learns_labels(loss) and config.hard_labels == "data" and needs_label_column(task)
    split = config.eval_split or ("validation" if "validation" in cache.splits else None)
    usable = config.eval_split is not None or (split is not None and split not in config.split)
    if split is not None and usable and not (needs_labels and _without_labels(cache, split)):
        cache.dataset(split)  # raises CacheError if there is no such split
        rows = _num_rows(cache, (split,))
        return _Measured(rows, f"{split}, {rows:,} rows")
    why = f"{split} is trained on, or has no labels" if split is not None else "no split validation"
    if config.eval_split is not None:
        return _Measured(0, why)
    if cache.remote is not None or (mixture is not None and mixture.kind == "data"):
        kind = "a cache behind a URL" if cache.remote is not None else "a mix of data"
        return _Measured(0, f"{why}, and no rows are held out of {kind}; name a split with --eval-split")
    train = cache.dataset(config.split)
    keep = labelled_rows(train, task, cache.where) if needs_labels else None
    affordable = rows_per_step * evaluation_steps(steps, 0, rows_per_step) // 2
    by = "position_labels" if task.label_source == "hidden" else "content_hash"
    if task.reads == "images":
        by = "image_hash"
    elif task.names == "places":
        by = "source_row"
    if task.target == "score":
        by = "score_group" if task.ranks else "input_ids"
    held_out = hold_out(train, keep, min(MOST_ROWS, max(FEWEST_ROWS, affordable)), by=by)
    if held_out is None:
        return _Measured(0, f"{why}, and too few rows to hold some out")
    rows, names = held_out.num_measured, ", ".join(config.split)
    equal = (
        f"; {held_out.num_equal:,} more of {'the same lists' if task.ranks else 'equal content'} are not trained on"
        if held_out.num_equal
        else ""
    )
    return _Measured(
        rows, f"{rows:,} rows held out of {names} by {'list' if task.ranks else 'content'} ({why}{equal})", held_out
    )


def _learns_labels(loss: Loss) -> bool:
    """Return whether the soft labels have no part in the loss."""
    return not (loss.soft_weight or loss.soft_weight_end or loss.span_weight)


def _num_rows(cache: Cache, splits: Sequence[str]) -> int:
    return sum(shard.rows for split in splits for shard in cache.manifest.split_shards(split))


def _without_labels(cache: Cache, split: str) -> bool:
    return not which_labelled(cache.dataset(split), get_task(cache.manifest.contract.task)).any()


def _loss_text(loss: Loss) -> str:
    temperature = "" if loss.temperature is None else f" at temperature {loss.temperature:g}"
    spans = f" + {loss.span_weight:g} aligned spans" if loss.span_weight else ""
    return f"{loss.hard_weight:g} hard labels + {loss.soft_weight:g} {loss.divergence}{temperature}{spans}"
