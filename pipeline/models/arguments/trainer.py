"""TrainingArguments from flags and the `training:` section, and progress on standard error."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from pipeline.errors import ConfigError
from pipeline.models.arguments.reporting import name_project, reporting
from pipeline.progress import Progress

#: Metrics that are better if lower: losses, divergences, errors, times. Others: if higher.
_SMALLER_IS_BETTER = frozenset(("loss", "nll", "divergence", "ece", "perplexity", "bits_per_byte", "mse", "runtime"))


def training_arguments(
    output: str, extra: dict[str, Any], *, report_to: Sequence[str] = (), **ours: Any
) -> TrainingArguments:
    """Return TrainingArguments from `ours`, overridden by `extra`.

    Args:
        extra: the `training:` section: any field of `transformers.TrainingArguments`.
        report_to: `--report-to`.
        ours: fields from flags and defaults.

    Raises:
        MisuseError: `--report-to` and `extra` contradict each other.
        ConfigError: an unknown field (the closest name is suggested), or a value that transformers
            refuses.
    """
    check_fields(extra)
    given = {**ours, **extra}
    metric = str(given.get("metric_for_best_model") or "").removeprefix("eval_")
    if metric and "greater_is_better" not in given:  # transformers assumes it for all names that do not end in "loss"
        ours["greater_is_better"] = metric not in _SMALLER_IS_BETTER
    quiet = {
        **reporting(output, report_to, extra),
        "disable_tqdm": True,
        "logging_steps": 20,
        "dataloader_pin_memory": False,
    }
    if num_ranks() > 1 and not torch.accelerator.is_available():
        quiet["use_cpu"] = True  # ranks form a process group on a CPU only with use_cpu
    try:
        args = TrainingArguments(output_dir=output, **{**quiet, **ours, **extra})
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training: {' '.join(str(error).split())}") from None
    hide_token(args)
    name_project(args)
    return args


def check_fields(names: Iterable[str]) -> None:
    """Refuse names that are no fields of `transformers.TrainingArguments`.

    Raises:
        ConfigError: names the first, and the closest field.
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
    """Return the number of processes that torchrun has started for a run; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class _Token(str):
    """A token that is pickled as an empty string.

    Trainer pickles its arguments next to every model, as training_args.bin.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[type[str], tuple[()]]:
        return str, ()

    def __deepcopy__(self, memo: Any) -> _Token:
        return self


def hide_token(args: TrainingArguments) -> None:
    """Keep the hub token out of all files that are written."""
    if args.hub_token is not None:
        args.hub_token = _Token(args.hub_token)


@dataclasses.dataclass(slots=True)
class Seen:
    """Counts the rows and tokens that one rank's trainer has read since the last `drain`."""

    rows: int = 0
    tokens: Any = 0
    """Without padding. A tensor if the batches are on a device, so that counting does not
    synchronise."""

    def add(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Count the batches of one step."""
        for batch in batches:
            mask = batch.get("inputs", batch).get("attention_mask")
            if mask is not None:
                self.rows += mask.shape[0]
                self.tokens = self.tokens + mask.sum()

    def drain(self) -> tuple[int, Any]:
        """Return rows and tokens, and reset them to 0."""
        found = self.rows, self.tokens
        self.rows, self.tokens = 0, 0
        return found


def show_progress(trainer: Trainer, description: str) -> None:
    """Show progress on standard error instead of Trainer's bar, which prints to standard output."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_Steps(description, getattr(trainer, "seen", Seen())))


class _Steps(TrainerCallback):
    """Shows optimizer steps, rows and tokens per second over all ranks, and the latest loss."""

    def __init__(self, description: str, seen: Seen) -> None:
        self.description, self.seen = description, seen
        self.progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the progress display on the first rank."""
        if state.is_world_process_zero:
            self.progress = Progress(self.description, state.max_steps, unit="step", initial=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance by one step; the other ranks have read as many rows."""
        if self.progress is not None:
            rows, tokens = self.seen.drain()
            more = {"rows": rows * args.world_size, "tokens": tokens * args.world_size} if rows else {}
            self.progress.update(state.global_step - self.progress.done, **more)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the latest losses."""
        losses = {key: value for key, value in (logs or {}).items() if key.endswith("loss") and key != "train_loss"}
        if self.progress is not None and losses:
            note = ", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in losses.items())
            self.progress.update(0, note=note)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the progress display."""
        if self.progress is not None:
            self.progress.close()
