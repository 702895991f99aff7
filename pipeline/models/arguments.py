"""TrainingArguments from our few flags and the config's `training:` section, and progress on standard error."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable
from typing import Any

import torch
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from pipeline.errors import ConfigError

#: Of the metrics that an evaluation gives; the others are losses, divergences and errors.
_GREATER_IS_BETTER = ("accuracy", "macro_f1", "agreement")


def training_arguments(output: str, extra: dict[str, Any], **ours: Any) -> TrainingArguments:
    """`ours`, overridden by `extra`: any field of `transformers.TrainingArguments`.

    Raises:
        ConfigError: an unknown field (the nearest is suggested), or a value that transformers refuses.
    """
    check_fields(extra)
    given = {**ours, **extra}
    metric = str(given.get("metric_for_best_model") or "").removeprefix("eval_")
    if metric and "greater_is_better" not in given:  # transformers takes all for that but what ends in "loss"
        ours["greater_is_better"] = metric in _GREATER_IS_BETTER
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 20, "dataloader_pin_memory": False}
    if num_ranks() > 1 and not torch.accelerator.is_available():
        quiet["use_cpu"] = True  # ranks find each other on a CPU only where they are asked to use it
    try:
        args = TrainingArguments(output_dir=output, **{**quiet, **ours, **extra})
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training: {' '.join(str(error).split())}") from None
    hide_token(args)
    return args


def check_fields(names: Iterable[str]) -> None:
    """Refuse what is no field of `transformers.TrainingArguments`.

    Raises:
        ConfigError: names the first, and the nearest field.
    """
    known = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"training: unknown key {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else "; expected a field of TrainingArguments")
            )


def num_ranks() -> int:
    """How many processes torchrun has started for one run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class _Token(str):
    """A token that a pickle does not hold: Trainer writes its arguments beside every model, as training_args.bin."""

    __slots__ = ()

    def __reduce__(self) -> tuple[type[str], tuple[()]]:
        return str, ()

    def __deepcopy__(self, memo: Any) -> _Token:
        return self


def hide_token(args: TrainingArguments) -> None:
    """Keep the hub token out of everything that is written."""
    if args.hub_token is not None:
        args.hub_token = _Token(args.hub_token)


def show_progress(trainer: Trainer, description: str) -> None:
    """A bar on standard error in place of Trainer's own, which prints its logs to standard output."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_Progress(description))


class _Progress(TrainerCallback):
    """One bar over the optimizer steps; the newest loss beside it."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar, on the first rank only."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", desc=self.description, disable=None
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The newest losses."""
        if self.bar is not None and logs:
            self.bar.set_postfix({key: f"{value:.3f}" for key, value in logs.items() if key.endswith("loss")})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
