"""A local model as the teacher: one forward pass per batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.capture.automatic import fastest_batch_tokens
from pipeline.capture.forward import device_name, output_matrix, synchronize, teacher_logits
from pipeline.capture.teachers.protocol import Keep
from pipeline.errors import ModelError
from pipeline.models import LoadedModel, check_isolation, class_names, longest_input, model_info
from pipeline.records import Encoding, ModelInfo, Tokenization, TokenizedExample
from pipeline.tasks import Task, embedding_rows
from pipeline.tasks.answers.candidates import ENDS, choice_names

#: Only rows up to this many tokens are predicted twice in the check before the first shard.
_SHORT = 64


@dataclass(frozen=True, slots=True)
class Computed:
    """Logits of a forward pass that may still be running on a GPU."""

    logits: Tensor

    def result(self) -> Tensor:
        """Wait for the GPU and return the (N, V) logits."""
        synchronize(self.logits)
        return self.logits


@dataclass(frozen=True, slots=True)
class LocalTeacher:
    """A teacher in memory; see `Teacher` for the members."""

    task: Task
    loaded: LoadedModel
    tokenizer: PreTrainedTokenizerBase
    choices: int | None = None
    """The largest number of choices of a row; None if the task is not multiple choice."""

    @property
    def name(self) -> str:
        """Name for messages."""
        return self.loaded.name

    @property
    def model(self) -> Any:
        """The loaded model."""
        return self.loaded.model

    @property
    def num_classes(self) -> int:
        """V."""
        return self.choices or self.task.num_classes(self.model, self.tokenizer)

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """The class names of the model's configuration; for choices and places, fixed names."""
        if self.task.names is None:
            return None
        if self.task.names == "places":
            return ENDS
        if self.choices is not None:
            return choice_names(self.choices)
        return class_names(self.model)

    @property
    def info(self) -> ModelInfo:
        """Name, weights and precision of the model."""
        return model_info(self.loaded)

    @property
    def device(self) -> str:
        """Name of the device."""
        return device_name(self.loaded)

    @property
    def longest_input(self) -> int:
        """The largest number of tokens that the model has positions for."""
        return longest_input(self.model, self.tokenizer)

    @property
    def embedding_rows(self) -> int:
        """Rows of the input embedding; 0 for images, which have no tokens."""
        return embedding_rows(self.model) if self.task.reads != "images" else 0

    @property
    def output_matrix(self) -> Tensor | None:
        """The (V, H) output matrix; see `forward.output_matrix`."""
        return output_matrix(self.model, self.num_classes)

    @property
    def busy(self) -> bool:
        """Always true: a second batch would wait for the first and hold its logits in memory."""
        return True

    def describe(self, info: ModelInfo) -> str:
        """Return the number of parameters, the precision and the device."""
        return f"{self.name}: {info.num_parameters:,} parameters, {info.dtype}, on {self.device}"

    def settle(self, tokenization: Tokenization) -> Tokenization:
        """Add the number of choices, for multiple choice."""
        return tokenization if self.choices is None else dataclasses.replace(tokenization, num_choices=self.choices)

    def check(self, encoding: Encoding, tokenization: Tokenization, *, store_entropy: bool) -> None:
        """Check that the attention supports isolated documents; logits allow every encoding."""
        check_isolation(self.model, tokenization)

    def compare(self, rows: Sequence[TokenizedExample], encoding: Encoding, keep: Keep | None = None) -> None:
        """Compare the logits of supervised positions with a plain forward pass, on a short row.

        Raises:
            ModelError: the logits differ by more than the precision explains.
        """
        if self.task.names == "places" or self.task.reads == "images":  # has the plain path only
            return
        if self.choices is not None:  # the plain path gives logits to absent choices
            rows = [row for row in rows if row.document_lengths is not None and row.document_lengths.all()]
        if not rows:
            return
        shortest = min(rows, key=lambda row: row.num_tokens)
        if shortest.num_tokens > _SHORT:
            return
        model = self.model
        inputs, supervised = self.task.collate([shortest], 0, processor=self.tokenizer)
        # With a key-value cache, `transformers` does not derive document boundaries from position
        # ids.
        uncached = {"use_cache": False} if self.task.marks_positions else {}
        with torch.inference_mode():
            plain = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}, **uncached).logits
        marks = None if supervised is None else supervised.to(model.device)
        plain = self.task.at_positions(plain, marks)[:, : self.num_classes].float()
        found = self.begin([shortest], None, encoding).result().float()
        tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
        finite = plain.isfinite()  # non-finite logits are reported row by row, later
        if not bool(finite.any()):
            return
        worst = float((plain - found)[finite].abs().max() / plain[finite].abs().max().clamp_min(1.0))
        if not worst <= tolerance:
            raise ModelError(
                f"{self.name}: logits of the supervised positions alone differ from the model's own by {worst:.2g} (expected at most {tolerance:g}); this architecture "
                "cannot be cached safely: please report it"
            )

    def fastest_batch_tokens(self, tokenization: Tokenization) -> int:
        """Measure the fastest batch size on this device."""
        return fastest_batch_tokens(self.task, self.loaded, self.tokenizer, self.num_classes, tokenization)

    def close(self) -> None:
        """Do nothing; the model is freed with its last reference."""

    def begin(self, rows: Sequence[TokenizedExample], length: int | None, encoding: Encoding) -> Computed:
        """Run one forward pass."""
        logits = teacher_logits(self.task, self.loaded, self.tokenizer, rows, self.num_classes, length)
        return Computed(logits)
