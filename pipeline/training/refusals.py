"""Checks that refuse settings of Trainer and of the loss that have no effect or are unsupported."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import TrainingArguments

from pipeline.errors import EncodingError, MisuseError
from pipeline.records import Contract, Full, Loss, Predictions
from pipeline.softlabels import check_temperature
from pipeline.tasks import Task
from pipeline.training.batches.mixing import Mixture
from pipeline.training.divergences import check_divergence
from pipeline.training.scores import check_score_loss
from pipeline.training.settings import NEED_EVALUATION, REFUSED, REFUSED_PARAMETERS

logger = logging.getLogger(__name__)


def refuse_unused(args: TrainingArguments, trainer_kwargs: Mapping[str, Any]) -> None:
    """Refuse settings of Trainer that have no effect on distillation, instead of ignoring them.

    Raises:
        MisuseError: names the first such setting and the alternative.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for name, reason in REFUSED.items():
        value = getattr(args, name, None)
        value = getattr(value, "value", value)  # the value of an enumeration
        if value not in (None, False, 0, 0.0, "no", defaults.get(name)) and value != []:
            raise MisuseError(f"training: {name}: has no effect on distillation ({reason}); leave it out")
    for name, reason in REFUSED_PARAMETERS.items():
        if trainer_kwargs.get(name) is not None:
            raise MisuseError(f"{name}: {reason}; leave it out")
    if not getattr(args, "dataloader_in_order", True):
        raise MisuseError(
            f"training: dataloader_in_order: has no effect on distillation ({REFUSED['dataloader_in_order']}); leave it out"
        )
    refuse_unevaluated(args)
    if args.fsdp and "RANK" not in os.environ:
        raise MisuseError(
            "training: fsdp: shards the student over ranks, and this is one process; start it with torchrun --nproc_per_node N, or leave it out"
        )


def refuse_loss(
    loss: Loss, task: Task, contract: Contract, temperature: float, *, teacher_labels: bool, is_mapped: bool
) -> None:
    """Refuse a loss that cannot be computed from the soft labels of a cache.

    Args:
        is_mapped: whether the student has another tokenizer, so that its target is over other
            classes.

    Raises:
        EncodingError: the cache does not support the divergence, temperature or position weights.
        MisuseError: a setting that would be ignored.
    """
    refuse_position_weights(loss, task, contract)
    is_score = task.target == "score"
    has_groups = contract.source.columns.group is not None
    check_score_loss(loss, is_score=is_score, has_groups=has_groups, teacher_labels=teacher_labels)
    if (loss.soft_weight or loss.soft_weight_end) and not is_score:
        check_temperature(contract.encoding, temperature)
        check_divergence(contract.encoding, loss, is_mapped=is_mapped)


def refuse_two_cuts(batch_tokens: int | None, *, by_list: bool, mixture: Mixture | None) -> bool:
    """Return whether batches are cut within lanes, by tokens or by lists (see `BatchOrder`).

    Raises:
        MisuseError: both cuts are requested, or a cut is combined with `--proportion`, which
            selects other rows in every epoch and so changes the number of batches.
    """
    if by_list and batch_tokens is not None:
        raise MisuseError(
            "--batch-tokens: batches of lists are cut by rows; leave it out, --batch-size is the most rows"
        )
    if mixture is not None and mixture.kind == "data" and mixture.shares is not None:
        if batch_tokens is not None:
            raise MisuseError(
                "--proportion does not go with --batch-tokens, whose batches would differ in number by epoch"
            )
        if by_list:
            raise MisuseError(
                "--proportion does not go with a --divergence of lists, whose batches would differ in number by epoch; use mse"
            )
    return by_list or batch_tokens is not None


def refuse_spans(loss: Loss, *, teacher_labels: bool, several_teachers: bool) -> None:
    """Refuse a loss over aligned spans that needs the likelihood of one text from one teacher.

    Raises:
        MisuseError: the hard labels are not the text's own tokens, or there are several teachers.
    """
    if loss.span_weight and teacher_labels:
        raise MisuseError(
            "--span-weight: needs the text's own tokens as labels, and --hard-labels teacher replaces them; leave one of them out"
        )
    if loss.span_weight and several_teachers:
        raise MisuseError(
            "--span-weight: compares with one teacher's likelihood of the text, found several teachers; give one --cache, or leave it out"
        )


def refuse_unevaluated(args: TrainingArguments, *, instead: str = "set eval_strategy, or leave it out") -> None:
    """Refuse settings that depend on an evaluation if there is none during training.

    transformers itself refuses further settings of this kind.

    Args:
        instead: the advice at the end of the message.

    Raises:
        MisuseError: names the first such setting.
    """
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no":
        return
    for name in NEED_EVALUATION:
        value = getattr(args, name)
        value = getattr(value, "value", value)  # the value of an enumeration
        unused = {"save_strategy": value == "best", "eval_delay": bool(value)}
        if unused.get(name, value is not None):
            raise MisuseError(
                f"training: {name}: has no effect without evaluations, and eval_strategy is no; {instead}"
            )


def refuse_evaluation(args: TrainingArguments) -> None:
    """Refuse evaluations during the training of a teacher, and settings that depend on them.

    Raises:
        MisuseError: names the first such setting.
    """
    evaluates = {
        "eval_strategy": str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no",
        "eval_on_start": args.eval_on_start,
    }
    for name, asked in evaluates.items():
        if asked:
            raise MisuseError(f"training: {name}: a teacher is evaluated once, at the end of training; leave it out")
    refuse_unevaluated(args, instead="a teacher is evaluated once, at the end of training: leave it out")


def use_one_gpu(args: TrainingArguments) -> None:
    """Use one GPU per process: DataParallel cannot split ragged targets."""
    if args.n_gpu > 1:
        logger.warning(
            "one process uses one GPU; for all %d start it with torchrun --nproc_per_node %d", args.n_gpu, args.n_gpu
        )
        args._n_gpu = 1


def check_metric(args: TrainingArguments, task: Task, num_classes: int, *, labelled: bool) -> None:
    """Refuse to choose the best checkpoint by a metric that the evaluation does not compute.

    Raises:
        MisuseError: lists the metrics that it computes.
    """
    if args.metric_for_best_model is None:
        return
    one = np.zeros(1, dtype=np.int64)
    ends = np.zeros(2 if task.names == "places" else 1, dtype=np.int64)  # the labels of one row
    single = Predictions(ends, ends, ends + 1.0, ends + 1.0, ends, ends, np.zeros(1), one + 1)
    names = ["nll" if name == "loss" else name for name in task.metrics(single, num_classes)] if labelled else []
    close = "correlation" if task.target == "score" else "agreement"
    measured = ["loss", *names, close, "divergence", "runtime", "samples_per_second", "steps_per_second"]
    metric = args.metric_for_best_model.removeprefix("eval_")
    if metric not in measured:
        unlabelled = "" if labelled else "; the split has no labels, which other metrics need"
        raise MisuseError(
            f"training: metric_for_best_model: expected one of {', '.join(measured)}, found {metric!r}{unlabelled}"
        )


def choose_eval_split(
    args: TrainingArguments, splits: Sequence[str], trained_on: str | Sequence[str], asked: str | None
) -> str | None:
    """Return the split that is evaluated during training.

    Default: `validation`, unless the student is trained on it.

    Raises:
        MisuseError: evaluation is requested and there is no split for it.
    """
    trained_on = (trained_on,) if isinstance(trained_on, str) else trained_on
    if asked is None and "validation" in splits and "validation" not in trained_on:
        return "validation"
    if asked is None and (args.eval_on_start or args.eval_strategy != "no"):
        wanted = "eval_on_start" if args.eval_strategy == "no" else f"eval_strategy {args.eval_strategy}"
        raise MisuseError(
            f"{wanted}: the cache has no split `validation` to evaluate on during training (it has {', '.join(splits)}, "
            f"trained on: {', '.join(trained_on)}); name one with --eval-split"
        )
    if asked in trained_on:
        logger.warning(
            "split %s: the student is trained on it too: its metrics do not show how it performs on other rows", asked
        )
    return asked


def refuse_position_weights(loss: Loss, task: Task, contract: Contract) -> None:
    """Refuse to weight positions by the teacher's entropy if the cache does not store it.

    Raises:
        EncodingError: the message gives the option that stores it.
    """
    known = isinstance(contract.encoding, Full) or "entropy" in contract.columns or not task.marks_positions
    if loss.position_weights != "equal" and not known:
        raise EncodingError(
            f"--position-weights {loss.position_weights}: needs the teacher's entropy at each position, and this cache stores only its sum over each row; "
            "cache again with --store-entropy"
        )
