"""Run `softlabel train-teacher`: fine-tune a teacher on the hard labels of a task."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments, set_seed

from pipeline.cache.format.codec import content_hash
from pipeline.cache.format.manifest import dump
from pipeline.cache.storage.commit import write_text
from pipeline.config import TrainTeacherConfig
from pipeline.errors import BadRowError, MisuseError, ModelError, SourceError
from pipeline.models import (
    LABELS,
    LoadedModel,
    choose_max_length,
    class_names,
    load_model,
    model_info,
    pad_id,
    set_chat_template,
)
from pipeline.models.arguments import check_fields, show_progress, training_arguments
from pipeline.models.doubts import warn_of_doubts
from pipeline.models.load import as_it_came
from pipeline.models.saved import checkpoints, model_files, remove
from pipeline.models.scoring import score_of
from pipeline.models.start import start_of
from pipeline.progress import track
from pipeline.records import BadRow, Predictions, Tokenization, TokenizedExample, is_known
from pipeline.sources import Labels, Source, head_names, label_reader, load_source, read_examples
from pipeline.sources.label_names import FEW_ROWS
from pipeline.sources.labels import is_number, listed
from pipeline.tasks import (
    Task,
    check_columns,
    check_ids,
    embedding_rows,
    free_pad_id,
    get_task,
    kept_pad_id,
    label_column,
    may_lack_head,
    needs_label_column,
)
from pipeline.training.batches.labelled import LabelledCollator, LabelledRows, choice_loss
from pipeline.training.checkpoints import course, rows_per_step, tell_of_new_start, whole_checkpoint
from pipeline.training.recipe.defaults import choose_teacher_arguments
from pipeline.training.refusals import refuse_evaluation
from pipeline.training.saving import BeforeTraining, SavingTrainer, no_directory
from pipeline.training.scores import ScoreLoss, scale_of_labels
from pipeline.training.stopping import CheckpointOnSigterm
from pipeline.training.student import processor_of

logger = logging.getLogger(__name__)

#: The file with the run's `TeacherOrigin`, written before the first step.
_ORIGIN = "teacher-origin.json"
#: The file with the metrics. It is written last, so that it marks a finished teacher.
_PROOF = "metrics.json"


@dataclass(frozen=True, slots=True)
class TeacherOrigin:
    """Everything that determines a run; only checkpoints of the same origin are resumed."""

    task: str
    label_names: tuple[str, ...] | None
    seed: int
    learning_rate: float
    rows_per_step: int
    rows_sha256: str
    """Hash of the training rows' tokens and labels."""
    model_sha256: str
    """Hash of the weights before the first step."""
    adapter_sha256: str | None
    course: dict[str, Any] | None
    """The settings of `checkpoints.course`."""


def run(config: TrainTeacherConfig, *, before_training: BeforeTraining | None = None) -> dict[str, float]:
    """Run `softlabel train-teacher`: fine-tune a model, save it and evaluate it.

    The model is evaluated on a held-out split. If the output holds an unfinished run with the same
    settings, training resumes from its newest complete checkpoint.

    Args:
        before_training: called with the trainer and the checkpoint to resume from, after all checks
            and before anything is written.

    Returns:
        The task's metrics on `validation`, or else on `test`; empty if the source has neither. They
        are saved in `metrics.json`.

    Raises:
        PipelineError: see its subclasses.
    """
    task = get_task(config.task)
    check_columns(task, config.data.columns, config.data.tokenization(2))
    before = _check_output(config)
    check_fields(config.training)
    holds = label_column(task)
    source = load_source(config.data, label_required=needs_label_column(task), holds=holds)
    names = head_names(source, config.data.label_map, holds=holds) if task.names in ("classes", "positions") else None
    set_seed(config.seed)  # for the random weights of a new head
    teacher = load_model(
        task,
        config.model,
        dtype="float32",
        label_names=names,
        new_head=may_lack_head(task),
        trainable=True,
        base_model=config.base_model,
    )
    set_chat_template(teacher.tokenizer, config.data.chat_template)
    settings = config.data.tokenization(choose_max_length(task, teacher, teacher.tokenizer, config.data.max_length))
    reads = task.names not in (None, "choices")
    labels = label_reader(source, names or (), config.data.label_map, holds=holds) if reads else None
    train, held_out = _split_names(source)
    skip = config.on_bad_row == "skip"
    rows = _read(task, source, train, labels, teacher.tokenizer, settings, skip=skip)
    if names is not None and task.target != "score":
        _tell_classes(task, source, train, names, rows)
    if task.reads != "images":
        check_ids(embedding_rows(teacher.model), rows, teacher.tokenizer, teacher.name)
    settings_given = {
        "learning_rate": config.learning_rate,
        "per_device_train_batch_size": config.batch_size,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps,
    }
    arguments, choices = choose_teacher_arguments(
        start_of(teacher.model, teacher.name),
        sum(p.numel() for p in teacher.model.parameters()),
        len(rows),
        {name: config.training.get(name, value) for name, value in settings_given.items()},
    )
    args = training_arguments(
        config.output,
        config.training,
        report_to=config.report_to,
        **arguments,
        seed=config.seed,
        save_strategy="no",
    )
    refuse_evaluation(args)
    filler, kept, padding = 0, None, None if task.reads == "images" else teacher.model.config.get_text_config()
    if padding is not None:
        filler = _training_pad_id(teacher, rows)
        kept, padding.pad_token_id = padding.pad_token_id, filler
    collator = LabelledCollator(task, filler, teacher.tokenizer)
    output, origin = Path(config.output), _origin(task, teacher, rows, names, args)
    checkpoint = None if config.overwrite else whole_checkpoint(output, _ORIGIN, origin)
    if checkpoint is None and not config.overwrite:
        tell_of_new_start(output, _ORIGIN)
    scale = scale_of_labels(rows) if task.target == "score" else None
    trainer = SavingTrainer(
        teacher.model,
        args if before_training is None else no_directory(args),
        again="run the same command again",
        scale=scale,
        data_collator=collator,
        train_dataset=LabelledRows(rows),
        compute_loss_func=ScoreLoss(scale) if scale is not None else choice_loss if task.reads == "choices" else None,
    )
    for choice in choices if args.should_save else ():
        logger.info("train-teacher %s: %s", output.name, choice)
    if before_training is not None:
        before_training(trainer, checkpoint)
    show_progress(trainer, "train-teacher")
    if args.should_save:
        if checkpoint is None:  # an old adapter would be loaded instead of the new model
            remove(before)
        write_text(output / _ORIGIN, dump(origin))
    with CheckpointOnSigterm(output) as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=checkpoint)
    if padding is not None:
        padding.pad_token_id = kept
    with as_it_came(teacher):
        trainer.save_model(config.output, _internal_call=True)  # pushed once all files are written
    if args.should_save:
        teacher.tokenizer.save_pretrained(config.output)
        if names is not None and hasattr(teacher.model, "peft_config"):
            write_text(output / LABELS, json.dumps(names) + "\n")
    metrics: dict[str, float] = {}
    measured: list[TokenizedExample] = []
    if held_out is not None:
        measured = _read(task, source, held_out, labels, teacher.tokenizer, settings, skip=skip)
        predictions = predict(task, teacher, measured, args.per_device_train_batch_size)
        warn_of_doubts(predictions, "the teacher", held_out)
        metrics = task.metrics(predictions, task.num_classes(teacher.model, teacher.tokenizer))
    content = {
        "split": held_out,
        "rows": len(rows),
        "measured_rows": len(measured),
        "max_length": settings.max_length,
        "metrics": metrics,
    }
    if args.should_save:
        write_text(output / _PROOF, json.dumps(content, indent=1) + "\n")
    trainer.push_saved()
    return metrics


def _origin(
    task: Task,
    teacher: LoadedModel,
    rows: Sequence[TokenizedExample],
    names: tuple[str, ...] | None,
    args: TrainingArguments,
) -> TeacherOrigin:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(content_hash(row).to_bytes(8))
        digest.update(b"" if row.supervised is None else np.packbits(row.supervised).tobytes())
    info = model_info(teacher)
    return TeacherOrigin(
        task=task.name,
        rows_sha256=digest.hexdigest(),
        label_names=names,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        learning_rate=args.learning_rate,
        rows_per_step=rows_per_step(args),
        model_sha256=info.weights_sha256,
        adapter_sha256=info.adapter_sha256,
        course=course(args, **processor_of(teacher)),
    )


def _check_output(config: TrainTeacherConfig) -> list[Path]:
    """Return the files in the output directory that a new teacher replaces.

    Raises:
        MisuseError: the output contains the pretrained model; or, without `overwrite`, a finished
            teacher or a run of unknown origin.
    """
    output, model = Path(config.output).resolve(), Path(config.model).resolve()
    if output == model:
        raise MisuseError(f"--output {config.output}: is the pretrained model's own directory; use another")
    if model.exists() and output in model.parents:
        raise MisuseError(f"--output {config.output}: holds the pretrained model {config.model}; use another")
    others = [path for name in (_PROOF, LABELS) if (path := output / name).is_file()]
    found = [*checkpoints(output), *model_files(output), *others]
    unfinished = (output / _ORIGIN).is_file() and not (output / _PROOF).is_file()  # whole_checkpoint checks its origin
    if found and not unfinished and not config.overwrite:
        what = "the checkpoints of a run" if not (model_files(output) or others) else "a finished model"
        raise MisuseError(f"--output {config.output}: holds {what}; use another, or --overwrite to train again")
    return found


def _training_pad_id(teacher: LoadedModel, rows: Sequence[TokenizedExample]) -> int:
    """Return the padding token's id for training: the configured one, or one that ends no row.

    Decoder-only classifiers take the last token that is not padding as the end of a row.

    Raises:
        ModelError: rows end with every token of the vocabulary.
    """
    kept = kept_pad_id(teacher.model)
    found = (
        kept
        if kept is not None
        else free_pad_id((int(row.input_ids[-1]) for row in rows), embedding_rows(teacher.model))
    )
    if found is None:
        raise ModelError(
            f"{teacher.name}: config.json has no usable pad_token_id, and rows end with every token of the vocabulary; set one"
        )
    return found


def predict(task: Task, loaded: LoadedModel, rows: Sequence[TokenizedExample], batch_size: int) -> Predictions:
    """Return a model's predictions on labelled rows."""
    model = loaded.model.eval()
    parts, labels, owners = [], [], []
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    for number, batch in enumerate(track(batches, "evaluation", len(batches), unit="step")):
        start = number * batch_size
        inputs, supervised = task.collate(batch, pad_id(loaded.tokenizer, model), processor=loaded.tokenizer)
        truth = torch.from_numpy(task.hard_labels(batch))
        with torch.inference_mode():
            moved = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            logits = task.gather_logits(model, moved, None if supervised is None else supervised.to(model.device))
        parts.append(score_of(task, logits.cpu(), truth))
        labels.append(truth.numpy())
        owners.append(np.repeat(np.arange(start, start + len(batch)), [row.num_positions for row in batch]))
    predicted = np.concatenate([part.predicted for part in parts])
    return Predictions(
        labels=np.concatenate(labels),
        predicted=predicted,
        confidence=np.concatenate([part.confidence for part in parts]),
        nll=np.concatenate([part.nll for part in parts]),
        teacher_predicted=predicted,
        rows=np.concatenate(owners),
        row_kl=np.zeros(len(rows)),
        row_text_bytes=np.array([row.text_bytes for row in rows]),
        label_names=class_names(loaded.model) if task.names in ("classes", "positions") else None,
        groups=np.unique([row.group for row in rows], return_inverse=True)[1] if task.ranks else None,
    )


def _split_names(source: Source) -> tuple[str, str | None]:
    if "train" not in source.splits:
        raise SourceError(f"{source.name}: expected a split `train` to fine-tune on, found {', '.join(source.splits)}")
    return "train", next((name for name in ("validation", "test") if name in source.splits), None)


def _tell_classes(
    task: Task, source: Source, split: str, names: Sequence[str], rows: Sequence[TokenizedExample]
) -> None:
    """Print the classes with their numbers of labels, and warn of absent and of rare ones.

    Absent classes occur in other splits only, or are 0 if the labels are 1 to 3.
    """
    labels = task.hard_labels(rows)
    several = task.names == "positions"
    counts = (labels.reshape(len(rows), -1) > 0).sum(0) if several else np.bincount(labels[is_known(labels)])
    counts = np.pad(counts, (0, len(names) - len(counts)))  # (classes,)
    found = sorted(zip(names, counts.tolist(), strict=True), key=lambda each: -each[1])
    shown = [f"{name} {count:,}" for name, count in found if count]
    more = [f"... ({len(shown)} in all)", *shown[-3:]] if len(shown) > 13 else shown[10:]
    logger.info("%s: split %s: labels by class: %s", source.name, split, ", ".join([*shown[:10], *more]))
    absent = [name for name, count in found if not count]
    if absent:
        advice = "number labels from 0, or" if all(map(is_number, names)) else "label rows of train with them, or"
        logger.warning(
            "%s: split %s: %d of %d classes have no training row (%s), but are classes of the teacher; %s give --label-map DATA=MODEL",
            *(source.name, split, len(absent), len(names), listed(absent), advice),
        )
    rare = [name for name, count in found if 0 < count < FEW_ROWS]
    if rare:
        logger.warning(
            "%s: split %s: %d of %d classes have fewer than %d labels (%s); if they are misspelt, join them with --label-map DATA=MODEL",
            *(source.name, split, len(rare), len(names), FEW_ROWS, listed(rare)),
        )


def _read(
    task: Task,
    source: Source,
    split: str,
    labels: Labels | None,
    tokenizer: Any,
    settings: Tokenization,
    *,
    skip: bool,
) -> list[TokenizedExample]:
    """Return the labelled rows of a split as tokens.

    Raises:
        BadRowError: a row cannot be read, unless `skip` leaves such rows out.
        SourceError: no row has a label.
    """
    count = len(source.splits[split])
    examples = track(read_examples(source, split, 0, count, labels), f"read {split}", count, stride=64)
    rows: list[TokenizedExample] = []
    bad: list[BadRow] = []
    partial = 0
    for item in task.tokenize(examples, split, tokenizer, settings):
        if isinstance(item, BadRow):
            if not skip:
                raise BadRowError(
                    f"{source.name}: split {split}, row {item.source_row}: {item.reason}; correct or remove the row, or leave such rows out with --on-bad-row skip"
                )
            bad.append(item)
            continue
        known = is_known(task.hard_labels([item]))
        if task.names == "positions" and task.target != "score" and known.any() and not known.all():
            # the model's own loss needs all labels of a row
            partial += 1
        elif known.any():
            rows.append(item)
    if partial:
        logger.warning(
            "%s: split %s: %d rows are left out because only some of their labels are known",
            *(source.name, split, partial),
        )
    if bad:
        logger.warning(
            "%s: split %s: %d rows are left out (--on-bad-row skip); the first is row %d: %s",
            *(source.name, split, len(bad), bad[0].source_row, bad[0].reason),
        )
    if not rows:
        label, found = source.columns.label, source.splits[split].column_names
        why = "" if label is None or label in found else f" (no column {label!r}; found {', '.join(found)})"
        raise SourceError(
            f"{source.name}: split {split} has no labelled row to learn from{why}; name the column with --label-column, and spell it alike in all files"
        )
    return rows
