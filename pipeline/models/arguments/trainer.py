"""TrainingArguments from our few flags and the config's `training:` section, and progress on standard error."""

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

#: Of the metrics that an evaluation gives; the others are losses, divergences and errors.
_GREATER_IS_BETTER = ("accuracy", "macro_f1", "agreement")


def training_arguments(
    output: str, extra: dict[str, Any], *, report_to: Sequence[str] = (), **ours: Any
) -> TrainingArguments:
    """`ours`, overridden by `extra`: any field of `transformers.TrainingArguments`.

    Args:
        report_to: `--report-to`.

    Raises:
        MisuseError: `--report-to` and `extra` contradict each other.
        ConfigError: an unknown field (the nearest is suggested), or a value that transformers
            refuses.
    """
    check_fields(extra)
    given = {**ours, **extra}
    metric = str(given.get("metric_for_best_model") or "").removeprefix("eval_")
    if metric and "greater_is_better" not in given:  # transformers takes all for that but what ends in "loss"
        ours["greater_is_better"] = metric in _GREATER_IS_BETTER
    quiet = {
        **reporting(output, report_to, extra),
        "disable_tqdm": True,
        "logging_steps": 20,
        "dataloader_pin_memory": False,
    }
    if num_ranks() > 1 and not torch.accelerator.is_available():
        quiet["use_cpu"] = True  # ranks find each other on a CPU only where they are asked to use it
    try:
        args = TrainingArguments(output_dir=output, **{**quiet, **ours, **extra})
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training: {' '.join(str(error).split())}") from None
    hide_token(args)
    name_project(args)
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


@dataclasses.dataclass(slots=True)
class Seen:
    """What the trainer of one rank has drawn since it was last asked."""

    rows: int = 0
    tokens: Any = 0
    """Without padding; a tensor where the batches lie on a device, so that counting waits for
    nothing."""

    def add(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """The batches of one step."""
        for batch in batches:
            mask = batch.get("inputs", batch).get("attention_mask")
            if mask is not None:
                self.rows += mask.shape[0]
                self.tokens = self.tokens + mask.sum()

    def drain(self) -> tuple[int, Any]:
        """Rows and tokens, from 0 again."""
        found = self.rows, self.tokens
        self.rows, self.tokens = 0, 0
        return found


def show_progress(trainer: Trainer, description: str) -> None:
    """Progress on standard error in place of Trainer's own bar, which prints its logs to standard output."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_Steps(description, getattr(trainer, "seen", Seen())))


class _Steps(TrainerCallback):
    """The optimizer steps, rows and tokens a second over all ranks, and the newest loss."""

    def __init__(self, description: str, seen: Seen) -> None:
        self.description, self.seen = description, seen
        self.progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, on the first rank only."""
        if state.is_world_process_zero:
            self.progress = Progress(self.description, state.max_steps, unit="step", initial=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further; the other ranks have drawn as many rows."""
        if self.progress is not None:
            rows, tokens = self.seen.drain()
            more = {"rows": rows * args.world_size, "tokens": tokens * args.world_size} if rows else {}
            self.progress.update(state.global_step - self.progress.done, **more)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The newest losses."""
        losses = {key: value for key, value in (logs or {}).items() if key.endswith("loss") and key != "train_loss"}
        if self.progress is not None and losses:
            note = ", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in losses.items())
            self.progress.update(0, note=note)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End."""
        if self.progress is not None:
            self.progress.close()
