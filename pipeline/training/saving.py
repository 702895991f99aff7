"""A `Trainer` that reports missing packages, full disks and hub errors in one line.

It also keeps the hub token out of all files.
"""

from __future__ import annotations

import contextlib
import copy
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import Trainer, TrainingArguments

from pipeline.cache.storage.commit import full_disk
from pipeline.errors import ConfigError, MisuseError, TrainingError
from pipeline.models.arguments import Seen, check_installed, hide_token, num_ranks, own_run
from pipeline.records import Scale, is_known
from pipeline.training.scores import standardized

#: Parts of the messages of torch and safetensors for a failed write; their errors have no errno.
_TORN = ("PytorchStreamWriter failed", "unexpected pos", "os error 28", "No space left", "Disk quota exceeded")


#: A callback before the first step, with the trainer and the checkpoint to resume from. It may
#: raise an exception to stop the run.
BeforeTraining = Callable[["SavingTrainer", str | None], None]


def no_directory(args: TrainingArguments) -> TrainingArguments:
    """Return a copy of the settings with an existing temporary directory as the output.

    Trainer creates its output directory on construction; a trainer that does not train must not.
    """
    made = copy.copy(args)
    made.output_dir = tempfile.gettempdir()
    return made


class SavingTrainer(Trainer):
    """A `Trainer` with clear errors for its environment: packages, disk, hub and process group."""

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        again: str = "run the same command with --resume",
        scale: Scale | None = None,
        **kwargs: Any,
    ) -> None:
        """Create the trainer.

        Args:
            again: advice on how to continue after the disk was full.
            scale: mean and standard deviation of the scores that the model learns; None: it gives
                no scores.
            kwargs: passed to `transformers.Trainer`.

        Raises:
            ConfigError: a package that a setting needs is missing.
            MisuseError: torchrun has started several ranks, and they form no process group.
        """
        if num_ranks() > 1 and args.world_size == 1:
            raise MisuseError(
                f"training: torchrun has started {num_ranks()} ranks without a process group: each would train separately and write to {args.output_dir}; set use_cpu if there is no GPU"
            )
        self.again = again
        self.scale = scale
        self.seen = Seen()
        hide_token(args)
        args.remove_unused_columns = False
        check_installed(args.report_to or (), "training: report_to:")
        try:
            super().__init__(model=model, args=args, **kwargs)
            if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
                self.get_optimizer_cls_and_kwargs(args, model)
        except (ImportError, RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())
            if not isinstance(error, ImportError) and not re.search(r"install|import", said):
                raise
            raise ConfigError(f"training: optim: a package is missing: {said}") from None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Call `Trainer.train`, as a separate run for each reporting service."""
        with own_run(self.args), standardized(self.model, self.scale):
            return super().train(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count the known labels of scores; Trainer would count nan, and skip a score of -100."""
        if self.scale is None:
            return super()._get_num_items_in_batch(batch_samples, device)
        count = torch.tensor(sum(int(is_known(batch["labels"]).sum()) for batch in batch_samples), device=device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Return the batches of the next step, and count their rows and tokens."""
        batches, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.seen.add(batches)
        return batches, counts

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the hub repository for `push_to_hub`.

        Raises:
            ConfigError: the hub cannot be reached, or refuses.
        """
        try:
            super().init_hf_repo(token, private)
        except Exception as error:  # raised by several HTTP libraries
            raise ConfigError(
                f"training: push_to_hub: the hub cannot be reached, or refuses ({_first_line(error)}); log in with hf auth login, or leave it out and push later"
            ) from None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model.

        Raises:
            TrainingError: the disk is full.
        """
        with _said(output_dir or str(self.args.output_dir), self.again):
            super().save_model(output_dir, _internal_call)

    def push_saved(self) -> None:
        """Push the output directory as it is, if `push_to_hub` is set.

        `Trainer.push_to_hub` would save the model again first.

        Raises:
            TrainingError: the hub cannot be reached, or refuses. The saved files are kept.
        """
        if not self.args.push_to_hub or not self.is_world_process_zero():
            return
        output = str(self.args.output_dir)
        if not Path(output, "README.md").exists():
            self.create_model_card(model_name=str(self.hub_model_id).rpartition("/")[2])
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        try:
            HfApi().upload_folder(
                repo_id=str(self.hub_model_id),
                folder_path=output,
                commit_message="End of training",
                token=self.args.hub_token,
                ignore_patterns=["_*", "checkpoint-*", ".*"],
                revision=self.args.hub_revision,
            )
        except Exception as error:  # raised by several HTTP libraries
            raise TrainingError(
                f"{output}: is finished and saved, and was not pushed to {self.hub_model_id}: {_first_line(error)}; "
                f"push it later: hf upload {self.hub_model_id} {shlex.quote(output)}"
            ) from error

    def save_state(self) -> None:
        """Save the trainer state with its log.

        Raises:
            TrainingError: the disk is full.
        """
        with _said(str(self.args.output_dir), self.again):
            super().save_state()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        where = f"{self.args.output_dir}/checkpoint-{self.state.global_step}"
        with _said(where, self.again), _own_names(self.model):
            super()._save_checkpoint(model, trial)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that lacks weights of the model; `Trainer` only warns.

        Raises:
            TrainingError: it lacks weights of the model.
        """
        weights = nn.Module.state_dict(self.model)  # type: ignore[arg-type]
        missing = set(load_result.missing_keys)
        loaded = {
            tensor.data_ptr() for name, tensor in weights.items() if name not in missing
        }  # tied weights are saved once
        lacking = sorted(name for name in missing if name in weights and weights[name].data_ptr() not in loaded)
        if lacking:
            raise TrainingError(
                f"{self.args.output_dir}: the checkpoint lacks {len(lacking)} weights of the model, such as {lacking[0]}; an earlier release saved them under other "
                "names: train again with --overwrite"
            )
        super()._issue_warnings_after_load(load_result)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _own_names(model: Any) -> Iterator[None]:
    """Save a checkpoint with the weight names of the modules.

    `save_pretrained` saves some architectures (ViT, Swin) under the names of older releases.
    `from_pretrained` converts them back and `Trainer`, which reads checkpoints, does not: it would
    resume with other weights.
    """
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    before = inner.__dict__.get("_weight_conversions")
    inner._weight_conversions = []
    try:
        yield
    finally:
        if before is None:
            del inner._weight_conversions
        else:
            inner._weight_conversions = before


@contextlib.contextmanager
def _said(where: str, again: str) -> Iterator[None]:
    """Raise a failed write as a `TrainingError` of one line."""
    try:
        yield
    except Exception as error:  # safetensors has its own exception class
        if getattr(error, "errno", None) is None and not any(part in str(error) for part in _TORN):
            raise
        torn = "the disk is full or cannot be written" if isinstance(error, RuntimeError) else None
        said = f"{where}: {torn}" if torn else str(full_disk(Path(where), error)).partition("; what was")[0]
        raise TrainingError(f"{said}; the earlier checkpoints are complete: free some space, then {again}") from error
