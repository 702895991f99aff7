"""Run `softlabel train-student`: train a student from caches, without loading the teacher."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainingArguments, set_seed

from pipeline.cache import Cache
from pipeline.cache.format.manifest import dump
from pipeline.cache.reading.alignment import check_alignment
from pipeline.cache.storage.commit import write_text
from pipeline.config import TrainStudentConfig, parse_bytes
from pipeline.cross_tokenizer.opening import cache_for
from pipeline.cross_tokenizer.view import own_tokenizer
from pipeline.errors import MisuseError
from pipeline.models import (
    LABELS,
    LoadedModel,
    model_info,
    tokenizer_info,
)
from pipeline.models.arguments import check_fields, show_progress, training_arguments
from pipeline.models.doubts import warn_of_doubts
from pipeline.models.load import as_it_came
from pipeline.models.saved import cast_weights, checkpoints, model_files, remove, round_weights
from pipeline.records import Loss, MixedCache, TrainResult
from pipeline.tasks import get_task
from pipeline.training.batches.collate import longest_row
from pipeline.training.batches.held_out import HeldOut, held_out_rows
from pipeline.training.batches.mixing import Mixture, make_mixture
from pipeline.training.card import CARD, make_card
from pipeline.training.checkpoints import course, rows_per_step, tell_of_new_start, whole_checkpoint
from pipeline.training.forward import detach_loss
from pipeline.training.recipe.defaults import Choice, choose_loss
from pipeline.training.recipe.make import make_recipe
from pipeline.training.saving import BeforeTraining, no_directory
from pipeline.training.spans import span_temperature
from pipeline.training.stopping import CheckpointOnSigterm
from pipeline.training.student import (
    add_adapter,
    caches_for_student,
    check_fit,
    load_student,
    processor_of,
)
from pipeline.training.trainer import DistillationTrainer

logger = logging.getLogger(__name__)

#: The file with the run's `Origin`, written before the first step.
ORIGIN = "origin.json"
#: The file with the run's result. It is written last, so that it marks a finished student.
_PROOF = "distillation.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """Everything that determines a run's loss; only checkpoints of the same origin are resumed."""

    cache_id: str
    loss: Loss
    split: str
    """The splits' names, separated by commas."""
    teacher_labels: bool
    seed: int
    learning_rate: float
    """A resumed optimizer would keep the learning rate that it was saved with."""
    rows_per_step: int
    """Over all ranks and accumulated batches; it determines the batches."""
    batch_tokens: int | None
    student_sha256: str
    """Hash of the weights before the first step."""
    adapter_sha256: str | None
    mixed: tuple[MixedCache, ...] = ()
    course: dict[str, Any] | None = None
    """The settings of `checkpoints.course` and of early stopping; None in runs of old versions."""


def run(
    config: TrainStudentConfig, cache: Cache | None = None, *, before_training: BeforeTraining | None = None
) -> TrainResult:
    """Run `softlabel train-student`; `cache` replaces `config.cache` if it is already open."""
    kept = parse_bytes("--cache-bytes", config.cache_bytes)
    caches = (
        [cache]
        if cache is not None
        else [Cache.open(path, cache_dir=config.cache_dir, cache_bytes=kept) for path in config.cache]
    )
    _check_apart(config.output, config.student)
    caches = caches_for_student(config, caches)
    cache, mixture = caches[0], make_mixture(caches, config.mix_kind, config.teacher_weight or config.proportion)
    check_fields(config.training)
    set_seed(config.seed)  # for the random weights of a new head or adapter
    student = load_student(
        cache.manifest.contract,
        config.student,
        trust_remote_code=config.trust_remote_code,
        base_model=config.base_model,
    )
    for other in caches[1:]:
        check_fit(get_task(other.manifest.contract.task), other.manifest.contract, student)
    if config.lora_r is not None:
        student = add_adapter(get_task(cache.manifest.contract.task), student, config)
    recipe = make_recipe(config, cache, student, mixture)
    return fit(
        cache,
        student,
        training_arguments(config.output, config.training, report_to=config.report_to, **recipe.arguments),
        loss=recipe.loss,
        split=config.split,
        eval_split=config.eval_split,
        teacher_labels=config.hard_labels == "teacher",
        batch_tokens=config.batch_tokens,
        early_stopping=recipe.early_stopping,
        held_out=recipe.held_out,
        choices=recipe.choices,
        resume=config.resume,
        overwrite=config.overwrite,
        mixture=mixture,
        save_dtype=None if config.save_dtype == "auto" else getattr(torch, config.save_dtype),
        before_training=before_training,
    )


def train_student(
    cache: Cache | str | Path,
    student: str | Path | PreTrainedModel,
    output: str | Path,
    *,
    loss: Loss | None = None,
    args: TrainingArguments | None = None,
    split: str | Sequence[str] = "train",
    overwrite: bool = False,
) -> TrainResult:
    """Train a student from a cache, or resume an unfinished run with the same settings in `output`.

    Args:
        student: a hub name, a path, or a model in memory (which uses the cache's tokenizer).
        loss: default: chosen as by `softlabel train-student`.
        args: as for `transformers.Trainer`; `output_dir` is replaced by `output`. Default: chosen
            as by `softlabel train-student`.
        split: the split to train on; several splits are mixed.
        overwrite: delete the student or the checkpoints in `output`.

    Raises `PipelineError`.
    """
    opened = cache if isinstance(cache, Cache) else Cache.open(cache)
    contract = opened.manifest.contract
    set_seed(0 if args is None else args.seed)  # for the random weights of a new head
    if isinstance(student, str | Path):
        _check_apart(output, student)
        opened = cache_for(opened, str(student), split)
        contract = opened.manifest.contract
        loaded = load_student(contract, str(student))
    else:
        loaded = LoadedModel(student, opened.tokenizer, type(student).__name__)
        check_fit(get_task(contract.task), contract, loaded)
    splits = (split,) if isinstance(split, str) else tuple(split)
    if args is not None:
        args.output_dir = str(output)
        task = get_task(contract.task)
        chosen, _ = choose_loss(contract.encoding, predicts_tokens=task.predicts_tokens, ranks=task.ranks)
        return fit(opened, loaded, args, loss=loss or chosen, split=splits, overwrite=overwrite)
    flags = TrainStudentConfig(cache=opened.where, student=loaded.name, output=str(output), split=splits)  # type: ignore[arg-type]
    recipe = make_recipe(flags, opened, loaded, None, loss=loss)
    return fit(
        opened,
        loaded,
        training_arguments(str(output), {}, **recipe.arguments),
        loss=recipe.loss,
        split=splits,
        early_stopping=recipe.early_stopping,
        held_out=recipe.held_out,
        choices=recipe.choices,
        overwrite=overwrite,
    )


def fit(
    cache: Cache,
    student: LoadedModel,
    args: TrainingArguments,
    *,
    loss: Loss,
    split: str | Sequence[str] = "train",
    eval_split: str | None = None,
    teacher_labels: bool = False,
    batch_tokens: int | None = None,
    early_stopping: int | None = None,
    held_out: HeldOut | None = None,
    choices: Sequence[Choice] = (),
    resume: bool = False,
    overwrite: bool = False,
    mixture: Mixture | None = None,
    save_dtype: torch.dtype | None = None,
    before_training: BeforeTraining | None = None,
) -> TrainResult:
    """Train a student, and save a model directory with a record of its origin and a model card.

    Args:
        held_out: rows of `split` to evaluate on, instead of a split.
        choices: settings that were chosen by default; they are logged before the first step.
        save_dtype: dtype of the saved weights; default: that of the student's own files. Adapters
            are saved in the dtype that PEFT uses.
        before_training: called with the trainer and the checkpoint to resume from, after all checks
            and before anything is written.

    Raises:
        MisuseError: `output` holds a finished student, or a model that train-student did not make.
        ContractError: it holds checkpoints of another run; soft labels do not fit their tokens.
        PipelineError: see `DistillationTrainer`.
    """
    contract = cache.manifest.contract
    splits = (split,) if isinstance(split, str) else tuple(split)
    output = Path(str(args.output_dir))
    if not (output / ORIGIN).is_file() and any(_of_a_model(output)):
        raise MisuseError(
            f"--output {output}: holds a model or a model card that train-student has not made, and would be overwritten; use another directory"
        )
    if not resume and not overwrite:
        _check_unfinished(output)
    for each in (cache, *(mixture.others if mixture is not None else ())):
        check_alignment(each.as_captured, list(splits))
    is_retokenized = tokenizer_info(student.tokenizer).sha256 != contract.tokenizer.sha256
    max_length = longest_row(get_task(contract.task), contract, student)
    started = time.monotonic()
    info = model_info(student)
    origin = Origin(
        cache_id=cache.manifest.cache_id,
        loss=loss,
        split=", ".join(splits),
        teacher_labels=teacher_labels,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        learning_rate=args.learning_rate,
        rows_per_step=rows_per_step(args),
        batch_tokens=batch_tokens,
        student_sha256=info.weights_sha256,
        adapter_sha256=info.adapter_sha256,
        mixed=_mixed(cache, mixture),
        course=course(args, early_stopping=early_stopping, **held_out_rows(held_out), **processor_of(student)),
    )
    checkpoint = None if overwrite else _checkpoint(output, origin, resume=resume)
    trainer = DistillationTrainer(
        student.model,
        args if before_training is None else no_directory(args),
        cache=cache,
        loss=loss,
        split=splits,
        eval_split=eval_split,
        teacher_labels=teacher_labels,
        batch_tokens=batch_tokens,
        student_tokenizer=student.tokenizer if is_retokenized else None,
        max_length=max_length,
        mixture=mixture,
        held_out=held_out,
    )
    if early_stopping is not None:
        trainer.add_callback(EarlyStoppingCallback(early_stopping))
    for choice in choices if args.should_save else ():
        logger.info("train-student %s: %s", output.name, choice)
    if before_training is not None:
        before_training(trainer, checkpoint)
    show_progress(trainer, f"train-student {output.name}")
    if args.should_save:
        if checkpoint is None:  # an old adapter or checkpoint would be loaded instead of the new model
            remove(_of_a_model(output))
        write_text(output / ORIGIN, dump(origin))
    with CheckpointOnSigterm(output) as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=checkpoint)
    is_adapter = hasattr(student.model, "peft_config")
    precision = torch.float32 if is_adapter else save_dtype or student.file_dtype or torch.float32
    if precision != torch.float32:  # so that the metrics are of the weights in the file
        round_weights(student.model, precision)
    with as_it_came(student):
        trainer.save_model(str(output), _internal_call=True)  # pushed once all files are written
    if args.should_save and precision != torch.float32:
        cast_weights(output, precision)
    trainer.save_state()
    if args.should_save:
        student.tokenizer.save_pretrained(str(output))
        if info.adapter_sha256 is not None and contract.label_names is not None:
            write_text(output / LABELS, json.dumps(contract.label_names) + "\n")
    logged = next((entry for entry in reversed(trainer.state.log_history) if "loss" in entry), {})
    last = {**logged, **trainer.drain_losses()}
    measured_on = trainer.eval_split or (f"{origin.split} (held out)" if held_out is not None else None)
    metrics = {} if measured_on is None else _measure(trainer, measured_on)
    detach_loss(student.model)
    result = TrainResult(
        output=str(output),
        cache_id=cache.manifest.cache_id,
        loss=dataclasses.replace(
            loss, temperature=trainer.temperature, span_temperature=span_temperature(loss) if loss.span_weight else None
        ),
        learning_rate=args.learning_rate,
        seed=args.seed,
        steps=trainer.state.global_step,
        seconds=round(time.monotonic() - started, 1),
        hard_loss=last.get("hard_loss"),
        soft_loss=last.get("soft_loss"),
        num_parameters=sum(p.numel() for p in student.model.parameters()),
        num_trainable=sum(p.numel() for p in student.model.parameters() if p.requires_grad),
        max_length=max_length,
        eval_split=measured_on,
        metrics=metrics,
        eval_rows=_eval_rows(cache, trainer.eval_split, held_out),
        most_steps=trainer.state.max_steps if early_stopping else None,
        best_step=trainer.state.best_global_step,
        split=origin.split,
        rows=trainer.rows_of_an_epoch,
        mixed=origin.mixed,
        span_loss=last.get("span_loss"),
        own_tokenizer=own_tokenizer([cache, *(mixture.others if mixture is not None else ())], splits)
        if args.should_save
        else None,
    )
    if args.should_save:
        card = make_card(cache, student, result, splits=splits, teacher_labels=teacher_labels)
        write_text(output / CARD, card)
        write_text(output / _PROOF, dump(result))
    trainer.push_saved()
    return result


def _measure(trainer: DistillationTrainer, measured_on: str) -> dict[str, float]:
    """Return the metrics of the finished student on the evaluation rows; a collective call."""
    found = trainer.evaluation_loop(trainer.get_eval_dataloader(), "Evaluation").metrics or {}
    if trainer.is_world_process_zero():
        warn_of_doubts(trainer.predictions, "the student", measured_on)
    return {name.removeprefix("eval_"): value for name, value in found.items() if math.isfinite(value)}


def _eval_rows(cache: Cache, split: str | None, held_out: HeldOut | None) -> int | None:
    """Return the number of rows that the student is evaluated on."""
    if held_out is not None:
        return held_out.num_measured
    return sum(shard.rows for shard in cache.manifest.split_shards(split or "")) or None


def _mixed(cache: Cache, mixture: Mixture | None) -> tuple[MixedCache, ...]:
    """Return a record of each cache of a mixture, including the first."""
    if mixture is None:
        return ()
    shares = mixture.shares or (None,) * (1 + len(mixture.others))
    return tuple(
        MixedCache(each.manifest.cache_id, mixture.kind, share)
        for each, share in zip((cache, *mixture.others), shares, strict=True)
    )


def _check_unfinished(output: Path) -> None:
    """Refuse to replace a finished student, or weights without a checkpoint to resume from."""
    if (output / _PROOF).is_file():
        again = "--resume to continue from its newest checkpoint, " if checkpoints(output) else ""
        raise MisuseError(
            f"--output {output}: holds a finished student; use another, {again}or --overwrite to train it again"
        )
    if model_files(output) and not checkpoints(output):
        raise MisuseError(
            f"--output {output}: holds the weights of a student and no checkpoint to resume from; use another, or --overwrite to train it again"
        )


def _checkpoint(output: Path, origin: Origin, *, resume: bool) -> str | None:
    """Return the newest complete checkpoint, or None to start from the beginning.

    Raises:
        ContractError: checkpoints of another cache, split, loss or, without `resume`, course.
        MisuseError: a finished student would be replaced by a new one.
    """
    found = whole_checkpoint(output, ORIGIN, origin, resume=resume)
    if found is None and (output / _PROOF).is_file():
        raise MisuseError(
            f"--output {output}: holds a finished student and no complete checkpoint to resume from; use another, or --overwrite to train it again"
        )
    if found is None:
        tell_of_new_start(output, ORIGIN, resume=resume)
    return found


def _check_apart(output: str | Path, student: str | Path) -> None:
    """Refuse an output directory that is, or contains, the student to start from."""
    start, end = Path(student).resolve(), Path(output).resolve()
    if start.exists() and (start == end or end in start.parents):
        raise MisuseError(f"--output {output}: holds the student itself, which training would overwrite; use another")


def _of_a_model(output: Path) -> list[Path]:
    """Return the paths in a directory that belong to a model or a training run."""
    others = [path for name in (_PROOF, LABELS, CARD) if (path := output / name).exists()]
    return [*checkpoints(output), *model_files(output), *others]
