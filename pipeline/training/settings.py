"""Classify TrainingArguments fields and Trainer parameters: honoured, harmless or refused.

`tests/training/test_settings.py` compares the sets with the installed transformers, so that a new
field must be classified.
"""

from __future__ import annotations

from collections.abc import Iterable

#: Fields that are refused if set -> the reason, and what to do instead.
REFUSED = {
    "label_smoothing_factor": "the hard loss is plain cross-entropy; soft labels smooth it",
    "dataloader_drop_last": "the last step is filled up with rows of weight 0",
    "use_liger_kernel": "it replaces the forward pass that computes the fused loss",
    "liger_kernel_config": "use_liger_kernel is refused",
    "include_num_input_tokens_seen": "the manifest contains the number of tokens",
    "prediction_loss_only": "the metrics cost little; leave eval_strategy at no to compute none",
    "bf16_full_eval": "evaluation runs as training does, under bf16",
    "fp16_full_eval": "evaluation runs as training does, under fp16",
    "resume_from_checkpoint": "train-student --resume continues from the newest complete checkpoint of --output",
    "train_sampling_strategy": "the order of rows is a function of seed, epoch and cache; --batch-tokens groups rows by length",
    "length_column_name": "lengths come from the cache; --batch-tokens groups rows by length",
    "dataloader_multiprocessing_context": "the loader starts its workers in the platform's default way",
    "dataloader_in_order": "the order of rows is a function of seed, epoch and cache",
    "label_names": "the labels come from the cache",
    "include_for_metrics": "logits are not gathered; the metrics of the task are computed",
    "batch_eval_metrics": "logits are not gathered; the metrics of the task are computed",
}

#: Fields that are honoured if the run is evaluated during training, and refused otherwise: they
#: depend on the metrics or the time of an evaluation.
NEED_EVALUATION = (
    "save_strategy",
    "metric_for_best_model",
    "greater_is_better",
    "eval_steps",
    "eval_delay",
)

#: Fields that have no effect on the student: their work is done in another way, or by scripts.
HARMLESS = frozenset(
    [
        "remove_unused_columns",
        "eval_do_concat_batches",
        "eval_use_gather_object",
        "eval_accumulation_steps",
        "do_train",
        "do_eval",
        "do_predict",
        "local_rank",
        "average_tokens_across_devices",
    ]
)

#: Fields that are passed on to transformers, with the effect that it documents.
HONOURED = frozenset(
    [
        "output_dir",
        "per_device_train_batch_size",
        "num_train_epochs",
        "max_steps",
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "optim",
        "optim_args",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "optim_target_modules",
        "gradient_accumulation_steps",
        "max_grad_norm",
        "bf16",
        "fp16",
        "tf32",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "use_cache",
        "neftune_noise_alpha",
        "torch_empty_cache_steps",
        "auto_find_batch_size",
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "log_on_each_node",
        "logging_nan_inf_filter",
        "log_level",
        "log_level_replica",
        "disable_tqdm",
        "report_to",
        "run_name",
        "project",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "per_device_eval_batch_size",
        "eval_on_start",
        "save_only_model",
        "save_strategy",
        "save_steps",
        "save_on_each_node",
        "save_total_limit",
        "enable_jit_checkpoint",
        "push_to_hub",
        "hub_token",
        "hub_private_repo",
        "hub_model_id",
        "hub_strategy",
        "hub_always_push",
        "hub_revision",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
        "restore_callback_states_from_checkpoint",
        "full_determinism",
        "seed",
        "data_seed",
        "use_cpu",
        "accelerator_config",
        "parallelism_config",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "ddp_find_unused_parameters",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_static_graph",
        "ddp_backend",
        "ddp_timeout",
        "fsdp",
        "fsdp_config",
        "deepspeed",
        "debug",
        "skip_memory_metrics",
        "ignore_data_skip",
    ]
)

#: Parameters of Trainer that DistillationTrainer refuses.
REFUSED_PARAMETERS = {
    "compute_metrics": "logits are not gathered; the metrics of the task, agreement and divergence are computed",
    "preprocess_logits_for_metrics": "logits are not gathered; the metrics of the task, agreement and divergence are computed",
    "compute_loss_func": "the loss is the distillation loss; its weights and divergence are set by loss=Loss(...)",
    "model_init": "the student is given as model",
    "train_dataset": "rows come from cache= and split=",
    "eval_dataset": "rows come from cache= and eval_split=",
    "data_collator": "the task builds the batches from the cache",
}

#: Parameters of Trainer that are passed on to it.
HONOURED_PARAMETERS = frozenset(
    {"model", "args", "processing_class", "callbacks", "optimizers", "optimizer_cls_and_kwargs"}
)


def settings_table() -> str:
    """Return `docs/training-arguments.md`: how each field and parameter is handled, as Markdown."""
    refused = [
        *((f"`{name}`", reason) for name, reason in sorted(REFUSED.items())),
        *((f"`Trainer({name}=)`", reason) for name, reason in sorted(REFUSED_PARAMETERS.items())),
    ]
    rows = "".join(f"| {name} | {reason} |\n" for name, reason in refused)
    return (
        "# Settings of TrainingArguments and Trainer\n\n"
        "This page lists how `train-student` and `DistillationTrainer` handle each field of\n"
        "`TrainingArguments` and each parameter of `Trainer`. It is generated by `settings_table()` in\n"
        "`pipeline/training/settings.py`. Tests compare the page with the code, and the code with the\n"
        "installed `transformers`.\n\n"
        "## Refused before the first step\n\n"
        "These settings would have no effect on distillation, or they conflict with how it computes rows,\n"
        "losses and metrics.\n\n"
        f"| setting | reason, and what to do instead |\n|---|---|\n{rows}\n"
        "## Refused while `eval_strategy` is `no`\n\n"
        "These settings use the metrics of an evaluation or set its time. `save_strategy` is refused only\n"
        "if it is `best`.\n\n"
        f"{_listed(NEED_EVALUATION)}\n"
        "## Without effect\n\n"
        "These settings are accepted and ignored: the pipeline does the work in another way, or only\n"
        "scripts read them.\n\n"
        f"{_listed(HARMLESS)}\n"
        "## Passed on\n\n"
        "These settings are passed to `transformers` and have the documented effect.\n\n"
        f"{_listed(HONOURED)}"
    )


def _listed(names: Iterable[str]) -> str:
    return "".join(f"- `{name}`\n" for name in sorted(names))
