"""A `transformers.Trainer` that trains a student on the soft labels of a cache."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from pipeline.cache import Cache, CacheDataset
from pipeline.cache.format.moments import scale_of
from pipeline.errors import TrainingError
from pipeline.metrics import agreement_of
from pipeline.models import pad_id
from pipeline.progress import track
from pipeline.records import Loss, is_known
from pipeline.softlabels import default_temperature, served_temperature
from pipeline.tasks import get_task, needs_label_column
from pipeline.training.batches.collate import Collator, TrainingRows, of_student
from pipeline.training.batches.held_out import HeldOut, labelled_rows, which_labelled
from pipeline.training.batches.mixing import AlignedDataset, JoinedDataset, Mixture, Proportions, TeachersCollator
from pipeline.training.batches.order import BatchOrder, open_groups, rows_of_epoch
from pipeline.training.batches.prefetch import prefetch
from pipeline.training.forward import GIVEN, SUMS, attach_loss, kept_scores, predictions_of
from pipeline.training.refusals import (
    check_metric,
    choose_eval_split,
    refuse_loss,
    refuse_spans,
    refuse_two_cuts,
    refuse_unused,
    use_one_gpu,
)
from pipeline.training.saving import SavingTrainer
from pipeline.training.schedule import weights_of_evaluation, weights_of_step
from pipeline.training.scores import BY_GROUP, standardized

logger = logging.getLogger(__name__)


class DistillationTrainer(SavingTrainer):
    """Trains a student on hard and soft labels of a cache.

    loss = hard_weight * sum CE / N_hard + soft_weight * T^2 * sum D / N_soft, and for batches with
    aligned spans + span_weight * sum w L / sum w. Each divisor is counted over all ranks and
    accumulated batches, so that the gradient does not depend on how rows are distributed over them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        cache: Cache,
        loss: Loss,
        split: str | Sequence[str] = "train",
        eval_split: str | None = None,
        teacher_labels: bool = False,
        batch_tokens: int | None = None,
        student_tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
        mixture: Mixture | None = None,
        held_out: HeldOut | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Create a trainer for an open cache.

        Args:
            split: the split to train on; several splits are mixed.
            eval_split: evaluated during training. Default: `validation`, unless trained on.
            teacher_labels: use the teacher's most likely class as the hard label.
            batch_tokens: group rows by length, up to this many tokens per batch, padding included.
            student_tokenizer: tokenizes the stored text, up to `max_length`. None: the cache's
                tokens.
            mixture: more caches: teachers of the same rows, or more rows.
            held_out: rows of `split` that are evaluated on instead of a split, and not trained on.

        Raises:
            EncodingError: the cache does not support the temperature, divergence or position
                weights.
            CacheError: the cache has no such split.
            TrainingError: only hard labels are trained on, and no row has one.
        """
        contract = cache.manifest.contract
        self.cache = cache
        self.task = get_task(contract.task)
        is_soft = loss.soft_weight or loss.soft_weight_end
        if self.task.target == "score" and not is_soft:  # for the logs of a control
            loss = dataclasses.replace(loss, divergence="mse")
        self.loss = loss
        self.temperature = loss.temperature or default_temperature(contract.encoding, self.task.default_temperature)
        self.mixture = mixture
        contracts = [each.manifest.contract for each in (cache, *(mixture.others if mixture is not None else ()))]
        for each in contracts:
            is_mapped = cache.vocabulary_map is not None
            refuse_loss(loss, self.task, each, self.temperature, teacher_labels=teacher_labels, is_mapped=is_mapped)
        if not is_soft:  # the target is still computed for the logs, at a temperature of the cache
            self.temperature = served_temperature(contract.encoding)
        refuse_spans(
            loss, teacher_labels=teacher_labels, several_teachers=mixture is not None and mixture.kind == "teachers"
        )
        self.collator = Collator(
            task=self.task,
            tokenizer=student_tokenizer or cache.tokenizer,
            pad_id=pad_id(student_tokenizer or cache.tokenizer, model),
            temperature=self.temperature,
            tail=loss.tail,
            retokenize=None if student_tokenizer is None else of_student(contract, max_length),
            teacher_labels=teacher_labels,
            position_weights=loss.position_weights,
            vocabulary_map=cache.vocabulary_map,
            with_spans=loss.span_weight > 0 and cache.vocabulary_map is not None,
            scale=scale_of(cache.manifest),
            by_list=self.loss.divergence in BY_GROUP,
        )
        self.batch_tokens = batch_tokens
        refuse_unused(args, trainer_kwargs)
        use_one_gpu(args)
        self.by_list = self.collator.by_list
        in_batches = refuse_two_cuts(batch_tokens, by_list=self.by_list, mixture=mixture)
        rows = self._rows(split, window=open_groups(args.world_size, in_batches=in_batches))
        self.held_out = held_out
        self.keep: Any = held_out.left if held_out is not None else self._rows_that_teach(rows, teacher_labels)
        if isinstance(rows, JoinedDataset) and mixture is not None and mixture.shares is not None:
            seed = args.data_seed if args.data_seed is not None else args.seed
            self.keep = Proportions(tuple(map(int, rows.bounds)), mixture.shares, self.keep, seed)
        asked = None if held_out is not None else choose_eval_split(args, cache.splits, split, eval_split)
        self.eval_split = asked
        self.rows_of_an_epoch = rows_of_epoch(rows, self.keep)
        self._totals = np.zeros(len(SUMS))
        self._where_last = ""
        self._epoch: Iterator[Any] | None = None
        self._ahead: Generator[Any, None, None] = prefetch(iter(()))
        where = asked if held_out is None else split
        evaluated = None if where is None else self._rows(where, window=8, evaluated=True)
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collator,
            scale=self.collator.scale,
            train_dataset=TrainingRows(rows),
            eval_dataset=None if evaluated is None else TrainingRows(evaluated),
            **trainer_kwargs,
        )
        if evaluated is not None:
            known = bool(which_labelled(evaluated, self.task).any())
            check_metric(args, self.task, contract.num_classes, labelled=known)
        self.loss_is_scaled_for_ga = True
        # After Trainer has moved the model to its device: the trial of the head may need the GPU.
        attach_loss(model, task=self.task, num_classes=contract.num_classes, loss=loss, temperature=self.temperature)

    def _rows(self, split: str | Sequence[str], *, window: int, evaluated: bool = False) -> Any:
        """Return the rows of a split; an evaluation of mixed data uses the first cache only."""
        if self.mixture is None or (evaluated and self.mixture.kind == "data"):
            return self.cache.dataset(split, window=window)
        made = AlignedDataset if self.mixture.kind == "teachers" else JoinedDataset
        return made((self.cache, *self.mixture.others), split, window=window)

    def _rows_that_teach(self, dataset: Any, teacher_labels: bool) -> np.ndarray | None:
        """Return which rows have a label if only labels are trained on; None: all rows are used."""
        soft = self.loss.soft_weight or self.loss.soft_weight_end
        if soft or teacher_labels or not needs_label_column(self.task):
            return None
        return labelled_rows(dataset, self.task, self.cache.where)

    # -------------------------------------------------------------------------------------- batches

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this rank's batches; accelerate would slice dimension 0 of ragged targets."""
        return self._loader(self.train_dataset, self._train_batch_size, shuffle=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return this rank's batches of the evaluation rows, in order."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return self._loader(
            TrainingRows(rows) if isinstance(rows, CacheDataset) else rows, self.args.eval_batch_size, shuffle=False
        )

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Return evaluation batches; `predict(cache.dataset("test"))` gives the same metrics."""
        return self.get_eval_dataloader(test_dataset)

    def _loader(self, rows: Any, batch_size: int, *, shuffle: bool) -> DataLoader[Any]:
        budget = self.batch_tokens if shuffle else None
        order = BatchOrder(
            rows.dataset,
            batch_size,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            shuffle=shuffle,
            keep=self.keep if shuffle else self._measured(rows),
            lengths=None if budget is None else rows.dataset.num_tokens(),
            batch_tokens=budget,
            lists=rows.dataset.column("score_group") if self.by_list else None,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        collate: Any = self.collator
        if not shuffle:
            collate = dataclasses.replace(self.collator, teacher_labels=False, for_evaluation=True)
        if isinstance(rows.dataset, AlignedDataset) and self.mixture is not None and self.mixture.shares is not None:
            collate = TeachersCollator(collate, self.mixture.shares)
        workers = self.args.dataloader_num_workers
        return DataLoader(
            rows,
            batch_sampler=order,
            collate_fn=collate,
            num_workers=workers,
            generator=torch.Generator(),  # so that the loader does not advance dropout's generator
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=workers > 0 and self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
        )

    def _measured(self, rows: Any) -> np.ndarray | None:
        """Return (rows,) bool: the rows that are evaluated; None: all."""
        return self.held_out.measured if self.held_out is not None and rows is self.eval_dataset else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Call `Trainer.train`, and stop the prefetching thread at its end."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._ahead.close()

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Return the next batches from a prefetching thread; a resumed epoch has a new loader."""
        if self.args.dataloader_num_workers == 0 and epoch_iterator is not self._epoch:
            self._ahead.close()
            self._epoch, self._ahead = epoch_iterator, prefetch(epoch_iterator)
        return super().get_batch_samples(self._epoch_of(epoch_iterator), num_batches, device)

    def _epoch_of(self, epoch_iterator: Iterator[Any]) -> Iterator[Any]:
        return epoch_iterator if self.args.dataloader_num_workers else self._ahead

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Return (3,) divisors over batches and ranks: labels, soft weights, span weights."""
        hard = sum(int(is_known(batch["labels"]).sum()) for batch in batch_samples)
        soft = sum(float(batch["soft_weights"].sum()) for batch in batch_samples)
        spans = sum(float(batch["spans"]["weights"].sum()) for batch in batch_samples if "spans" in batch)
        counts = torch.tensor([[float(hard), soft, spans]], device=device)
        return self.accelerator.gather(counts).sum(0) if self.args.world_size > 1 else counts[0]

    # ----------------------------------------------------------------------------------------- loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return a batch's share of the loss, times world_size since ranks average gradients.

        Raises:
            TrainingError: a label that is no class, a loss that is not finite, or no position.
        """
        # Evaluations keep both terms unweighted; `_metrics` applies the weights.
        weights = weights_of_step(self.loss, *self._steps()) if model.training else (1.0, 1.0)
        given = {name: inputs[name] for name in GIVEN if name in inputs}
        given["loss_weights"] = torch.tensor(weights)
        if num_items_in_batch is not None:
            given["counts"] = num_items_in_batch
            weighted = zip(num_items_in_batch.tolist(), (*weights, self.loss.span_weight), strict=False)
            if not any(count * weight for count, weight in weighted):
                raise TrainingError(
                    f"{self._where(inputs)}: no position has a hard or soft weight above 0, so there is nothing to train on; "
                    "give a larger --batch-size, or a --soft-weight"
                )
        try:
            found = model(**inputs["inputs"], distillation=given)
        except TrainingError as error:
            raise TrainingError(f"{self._where(inputs)}: {error}") from None
        if not torch.isfinite(found["total"]):
            raise TrainingError(
                f"{self._where(inputs)}: expected a finite loss, found {float(found['total'].detach())} (hard {float(found['hard_sum']):.4g}, "
                f"soft {float(found['soft_sum']):.4g}, spans {float(found['span_sum']):.4g}); the earlier checkpoints are complete; train again with a lower --learning-rate"
            )
        if model.training:
            self._where_last = self._where(inputs)
            self._totals += [float(found[name]) for name in SUMS]
        scale = self.args.world_size if num_items_in_batch is not None and model.training else 1
        total = found["total"] * scale
        return (total, found) if return_outputs else total

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Raise TrainingError if the gradient is not finite; float16's scaler skips the step."""
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(float(norm)):
            raise TrainingError(
                f"{self._where_last}: expected a finite gradient, found a norm of {float(norm)}; the earlier checkpoints are complete; "
                "train again with a lower --learning-rate"
            )
        return norm

    def _steps(self) -> tuple[int, int]:
        return self.state.global_step, self.state.max_steps

    def _where(self, inputs: Mapping[str, Any]) -> str:
        rows = inputs["source_rows"].tolist()
        more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
        return f"step {self.state.global_step + 1}, source rows {', '.join(map(str, rows[:8]))}{more}"

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return the loss, the task's metrics, agreement and divergence on a split of the cache.

        Four numbers are kept per position instead of logits, and ranks may hold different numbers
        of positions. The task's own `loss` (the negative log-likelihood) is named `nll`.
        """
        with standardized(self.model, self.scale):  # keeps scores in float32 under mixed precision too
            return self._measure(dataloader, description, metric_key_prefix)

    def _measure(self, dataloader: DataLoader[Any], description: str, prefix: str) -> EvalLoopOutput:
        plain: Any = self.model
        model: Any = self._wrap_model(plain, training=False)
        if len(self.accelerator._models) == 0 and model is plain:  # not prepared by a training before
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        schedule_free = getattr(self.optimizer, "eval", None)  # such optimizers have other weights for evaluation
        if callable(schedule_free):
            schedule_free()
        parts: list[dict[str, np.ndarray]] = []
        batches: Any = dataloader if self.args.dataloader_num_workers else prefetch(iter(dataloader))
        shown = self.is_world_process_zero()
        for batch in track(batches, description.lower(), len(dataloader), unit="step", shown=shown):
            with torch.no_grad(), self.compute_loss_context_manager():
                _, found = self.compute_loss(model, self._prepare_inputs(batch), return_outputs=True)
            parts.append(kept_scores(batch, found))
        gathered = gather_object(parts) if self.args.world_size > 1 else parts
        merged = {name: np.concatenate([part[name] for part in gathered]) for name in gathered[0]}
        metrics = self._metrics(merged)
        named = {f"{prefix}_{name}": value for name, value in metrics.items()}
        rows: Any = dataloader.dataset
        return EvalLoopOutput(np.zeros(0), None, named, rows_of_epoch(rows, self._measured(rows)))

    def _metrics(self, found: Mapping[str, np.ndarray]) -> dict[str, float]:
        known = found["weights"] > 0
        predictions = predictions_of(found, self.cache.manifest.contract.label_names)
        self.predictions = predictions
        sums = {name: float(found[name].sum()) for name in SUMS}
        hard_weight, soft_weight = weights_of_evaluation(self.loss)
        hard = hard_weight * sums["hard_sum"] / sums["num_hard"] if sums["num_hard"] else 0.0
        soft = soft_weight * sums["soft_sum"] / sums["num_soft"] if sums["num_soft"] else 0.0
        span = sums["span_sum"] / sums["num_spans"] if sums["num_spans"] else 0.0
        metrics = {"loss": hard + soft + self.loss.span_weight * span}
        if is_known(predictions.labels).any():
            measured = self.task.metrics(predictions, self.cache.manifest.contract.num_classes)
            metrics.update({("nll" if name == "loss" else name): value for name, value in measured.items()})
        metrics["correlation" if self.task.target == "score" else "agreement"] = agreement_of(predictions)
        divergences = found["divergence"][known & is_known(found["teacher_predicted"])]
        metrics["divergence"] = float(np.nanmean(divergences)) if np.isfinite(divergences).any() else math.nan
        if sums["num_spans"]:
            metrics["span_loss"] = span
        return metrics

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return Trainer's estimate, from the part of the batch that the model is called with."""
        flops: int = super().floating_point_ops(inputs["inputs"])
        return flops

    # ------------------------------------------------------------------------------------------ log

    def drain_losses(self) -> dict[str, float]:
        """Return each term's mean since the last call, over all ranks; a collective call.

        Terms without a position or a weight are left out.
        """
        totals = torch.tensor(self._totals[None], device=self.args.device, dtype=torch.float32)
        if self.args.world_size > 1:
            totals = self.accelerator.gather(totals)
        hard, num_hard, soft, num_soft, span, num_spans = totals.double().sum(0).tolist()
        self._totals = np.zeros(len(SUMS))
        losses = {}
        if num_hard and (self.loss.hard_weight or self.loss.hard_weight_end):
            losses["hard_loss"] = float(hard / num_hard)
        if num_soft and (self.loss.soft_weight or self.loss.soft_weight_end):
            losses["soft_loss"] = float(soft / num_soft)
        if num_spans:
            losses["span_loss"] = float(span / num_spans)
        return losses

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add each loss term's mean, in nats at the scale of cross-entropy, to Trainer's logs."""
        if "loss" in logs:
            logs.update(self.drain_losses())
            if self.loss.schedule != "constant":
                step, num_steps = self._steps()
                logs["hard_weight"], logs["soft_weight"] = weights_of_step(self.loss, max(step - 1, 0), num_steps)
        super().log(logs, *args, **kwargs)
