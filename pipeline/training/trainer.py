"""`transformers.Trainer` over a cache: everything its users know works, and nothing else is loaded."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from pipeline.cache import Cache, CacheDataset
from pipeline.errors import ConfigError, TrainingError
from pipeline.records import NO_LABEL, Loss, LossTerms, Tokenization
from pipeline.softlabels import check_temperature, default_temperature, served_temperature
from pipeline.tasks import get_task
from pipeline.training.collate import Collator, TrainingRows, from_tensors
from pipeline.training.losses import distillation_loss
from pipeline.training.order import BatchOrder

logger = logging.getLogger(__name__)


class DistillationTrainer(Trainer):
    """Trains a student on hard and soft labels of a cache.

    loss = hard_weight * sum CE / N_hard + soft_weight * T^2 * sum D / N_soft, both N counted over all ranks and accumulated batches, so that the
    same rows give the same gradient however they are dealt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        cache: Cache,
        loss: Loss,
        split: str = "train",
        eval_split: str | None = None,
        teacher_labels: bool = False,
        student_tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Set up; the cache is opened already.

        Args:
            teacher_labels: the teacher's most likely class stands for the hard label.
            student_tokenizer: where it is not the cache's: the stored text is tokenized anew, up to `max_length`.
            trainer_kwargs: as `transformers.Trainer` takes them.

        Raises:
            ConfigError: `torch_compile`, which is not supported.
            EncodingError: the cache does not serve this temperature.
            CacheError: no such split.
            TrainingError: no row of the split can teach anything.
        """
        contract = cache.manifest.contract
        self.cache = cache
        self.loss = loss
        self.task = get_task(contract.task)
        self.temperature = loss.temperature or default_temperature(contract.encoding, self.task.default_temperature)
        if loss.soft_weight:
            check_temperature(contract.encoding, self.temperature)
        else:  # the target is made all the same, to be logged: at a temperature that there is
            self.temperature = served_temperature(contract.encoding)
        settings = contract.tokenization
        self.collator = Collator(
            task=self.task,
            tokenizer=student_tokenizer or cache.tokenizer,
            temperature=self.temperature,
            tail=loss.tail,
            retokenize=None if student_tokenizer is None else Tokenization(max_length or settings.max_length),
            teacher_labels=teacher_labels,
        )
        if (
            args.torch_compile
        ):  # compiled code does not see that the hook which selects positions is another one in each step
            raise ConfigError(
                "training: torch_compile: is not supported, a compiled student would be trained on the wrong positions; leave it out"
            )
        args.remove_unused_columns = False
        if args.n_gpu > 1:
            logger.warning(
                "one process uses one GPU; for all %d start it with torchrun --nproc_per_node %d",
                args.n_gpu,
                args.n_gpu,
            )
            args._n_gpu = 1  # DataParallel would split ragged targets
        self.keep = self._rows_that_teach(cache.dataset(split), teacher_labels)
        self._terms: list[list[float]] = []
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collator,
            train_dataset=TrainingRows(cache.dataset(split)),
            eval_dataset=None if eval_split is None else TrainingRows(cache.dataset(eval_split)),
            **trainer_kwargs,
        )
        self.loss_is_scaled_for_ga = True

    def _rows_that_teach(self, dataset: CacheDataset, teacher_labels: bool) -> np.ndarray | None:
        """With labels alone, unlabelled rows would be steps without a gradient: they are left out. None: every row counts."""
        if self.loss.soft_weight or teacher_labels or self.task.classes_are_tokens:
            return None
        labelled = ~np.isnan(dataset.column("label").astype(np.float64))
        if not labelled.any():
            raise TrainingError(
                f"{self.cache.root}: --soft-weight 0 trains on hard labels, and no row has one; give --soft-weight, or --hard-labels teacher"
            )
        return labelled

    # ------------------------------------------------------------------------------------------------- batches

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Whole batches are dealt to ranks by the order itself; accelerate would slice dimension 0 of ragged targets."""
        return self._loader(self.train_dataset, self._train_batch_size, shuffle=True, keep=self.keep)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The rows in order."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        return self._loader(chosen, self.args.eval_batch_size, shuffle=False, keep=None)

    def _loader(self, rows: Any, batch_size: int, *, shuffle: bool, keep: np.ndarray | None) -> DataLoader[Any]:
        order = BatchOrder(
            rows.dataset,
            batch_size,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            shuffle=shuffle,
            keep=keep,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        workers = self.args.dataloader_num_workers
        return DataLoader(
            rows,
            batch_sampler=order,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=workers > 0 and self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """(2,): labelled positions and positions, over the accumulated batches and all ranks. Trainer's own counts hard labels only."""
        hard = sum(int((batch["labels"] != NO_LABEL).sum()) for batch in batch_samples)
        soft = sum(float(batch["weights"].sum()) for batch in batch_samples)
        counts = torch.tensor([[float(hard), soft]], device=device)
        return self.accelerator.gather(counts).sum(0) if self.args.world_size > 1 else counts[0]

    # ---------------------------------------------------------------------------------------------------- loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """One batch of the weighted mean. Ranks average their gradients, hence the factor of world_size.

        Raises:
            TrainingError: the loss is not finite; the last checkpoint stays as it is.
        """
        batch = from_tensors(inputs, self.cache.manifest.contract.num_classes)
        logits = self.task.gather_logits(model, batch.inputs, batch.supervised)
        counts = (None, None) if num_items_in_batch is None else num_items_in_batch
        terms = distillation_loss(
            logits,
            batch.target,
            labels=batch.labels,
            loss=self.loss,
            temperature=self.temperature,
            weights=batch.weights,
            num_hard=counts[0],
            num_soft=counts[1],
        )
        if not torch.isfinite(terms.total):
            raise TrainingError(
                f"step {self.state.global_step + 1}: expected a finite loss, found {terms.total.item()} (hard {float(terms.hard_sum):.4g}, "
                f"soft {float(terms.soft_sum):.4g}); lower --learning-rate, then go on from the last checkpoint with --resume"
            )
        if model.training:
            self._remember(terms)
        scale = self.args.world_size if num_items_in_batch is not None and model.training else 1
        total = terms.total * scale
        return (total, {"loss": total.detach()}) if return_outputs else total

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """The loss of one batch of the evaluation split."""
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Trainer's estimate, from the part of the batch that the model sees."""
        flops: int = super().floating_point_ops(inputs["inputs"])
        return flops

    # ----------------------------------------------------------------------------------------------------- log

    def _remember(self, terms: LossTerms) -> None:
        self._terms.append([float(x) for x in (terms.hard_sum, terms.num_hard, terms.soft_sum, terms.num_soft)])

    def drain_losses(self) -> dict[str, float]:
        """Means of the terms since they were last logged, on this rank; a term without a position or a weight is left out."""
        if not self._terms:
            return {}
        hard, num_hard, soft, num_soft = np.asarray(self._terms).sum(0)
        self._terms.clear()
        losses = {"hard_loss": float(hard / num_hard)} if num_hard and self.loss.hard_weight else {}
        return {**losses, "soft_loss": float(soft / num_soft)} if num_soft and self.loss.soft_weight else losses

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Each term by itself, nats at the scale of cross-entropy, beside Trainer's own logs."""
        if "loss" in logs:
            logs.update(self.drain_losses())
        super().log(logs, *args, **kwargs)
