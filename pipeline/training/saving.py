"""What a run writes: no token in it, a full disk in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from pipeline.cache.storage.commit import full_disk
from pipeline.errors import TrainingError
from pipeline.models.arguments import hide_token

#: How torch and safetensors speak of a file that cannot be written, both without its number.
_TORN = ("PytorchStreamWriter failed", "unexpected pos", "os error 28", "No space left", "Disk quota exceeded")


class SavingTrainer(Trainer):
    """`Trainer`, as far as it writes."""

    def __init__(self, model: Any, args: TrainingArguments, **kwargs: Any) -> None:
        hide_token(args)
        args.remove_unused_columns = False
        super().__init__(model=model, args=args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model.

        Raises:
            TrainingError: the disk is full.
        """
        with _said(output_dir or str(self.args.output_dir)):
            super().save_model(output_dir, _internal_call)

    def save_state(self) -> None:
        """Save the log.

        Raises:
            TrainingError: the disk is full.
        """
        with _said(str(self.args.output_dir)):
            super().save_state()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with _said(f"{self.args.output_dir}/checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)


@contextlib.contextmanager
def _said(where: str) -> Iterator[None]:
    """What cannot be written, in one line."""
    try:
        yield
    except Exception as error:  # safetensors has a class of its own
        if getattr(error, "errno", None) is None and not any(part in str(error) for part in _TORN):
            raise
        torn = "the disk is full or cannot be written" if isinstance(error, RuntimeError) else None
        said = f"{where}: {torn}" if torn else str(full_disk(Path(where), error)).partition("; what was")[0]
        raise TrainingError(
            f"{said}; the checkpoints before are whole: free some space, then run the same command with --resume"
        ) from error
