"""Settings of Trainer that mean nothing here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from pipeline.errors import MisuseError


def refuse_unused(args: TrainingArguments, trainer_kwargs: Mapping[str, Any]) -> None:
    """Refuse settings of Trainer that mean nothing here, rather than ignore them.

    Raises:
        MisuseError: names the first, and what to do instead.
    """
    instead = {
        "label_smoothing_factor": "the hard loss is the plain cross-entropy; soft labels smooth it",
        "dataloader_drop_last": "the last step is filled up with rows of weight 0",
        "use_liger_kernel": "it replaces the forward pass that holds the fused loss",
        "include_num_input_tokens_seen": "the manifest has the number of tokens",
        "prediction_loss_only": "metrics are cheap here; leave eval_strategy at no to have none",
        "bf16_full_eval": "evaluation runs as training does, under bf16",
        "fp16_full_eval": "evaluation runs as training does, under fp16",
    }
    for name, reason in instead.items():
        if getattr(args, name, None) not in (None, False, 0, 0.0, "no"):
            raise MisuseError(f"training: {name}: has no effect on distillation ({reason}); leave it out")
    if trainer_kwargs.get("compute_metrics") is not None:
        raise MisuseError(
            "compute_metrics: logits are not gathered here; the metrics of the task, agreement and divergence are given"
        )
