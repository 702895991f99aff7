"""The `Teacher` protocol: tokenized rows in, soft labels over V classes and scores out.

Engines schedule shards for any teacher. No code outside this package depends on the kind of a
teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.capture.teachers.predictions import Predicted
from pipeline.records import Encoding, FirstAnswer, ModelInfo, Tokenization, TokenizedExample

#: Stores the first answer of a capture next to its plan unless one is stored; returns the stored
#: answer, or None.
Keep = Callable[[FirstAnswer], FirstAnswer | None]


class Begun(Protocol):
    """A batch that a teacher has started."""

    def result(self) -> Predicted:
        """Wait for the predictions of the batch.

        Raises:
            torch.OutOfMemoryError: the batch of a local model does not fit; the caller reports a
                remedy.
            PipelineError: no row can be predicted.
        """


class Teacher(Protocol):
    """A teacher, built once per process, before the contract."""

    @property
    def name(self) -> str:
        """Name for messages."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the rows."""

    @property
    def num_classes(self) -> int:
        """V of the soft labels."""

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Names of the V classes; None if class i is token i."""

    @property
    def info(self) -> ModelInfo:
        """The teacher's entry in the contract: everything about it that changes a prediction."""

    @property
    def device(self) -> str:
        """The device, as stored in receipts."""

    @property
    def longest_input(self) -> int:
        """The longest row that it accepts, in tokens."""

    @property
    def embedding_rows(self) -> int:
        """Number of rows of the input embedding; larger token ids have no embedding."""

    @property
    def output_matrix(self) -> Tensor | None:
        """(V, H) for the fidelity report (see `forward.output_matrix`); None: no report."""

    @property
    def busy(self) -> bool:
        """Whether the caller must take the result of a batch before it starts another one.

        Always true for a local model.
        """

    def describe(self, info: ModelInfo) -> str:
        """Return one line for `--dry-run`: name, size, device.

        Args:
            info: `self.info`, which a local model computes in a pass over its weights.
        """

    def settle(self, tokenization: Tokenization) -> Tokenization:
        """Return the tokenization with the settings that the teacher determines."""

    def check(self, encoding: Encoding, tokenization: Tokenization, *, store_entropy: bool) -> None:
        """Refuse settings that the teacher does not support, before anything is written.

        Raises:
            MisuseError: the message names an alternative.
        """

    def compare(self, rows: Sequence[TokenizedExample], encoding: Encoding, keep: Keep | None = None) -> None:
        """Check the teacher's predictions, before the first shard and in every process.

        Args:
            rows: a few rows of the data set; may be empty.
            keep: for a teacher that may change between two processes of a capture; None: store
                nothing.

        Raises:
            PipelineError: the check fails.
        """

    def fastest_batch_tokens(self, tokenization: Tokenization) -> int:
        """Return the fastest batch size in tokens, padding included, for `--auto-batch-tokens`.

        Raises:
            MisuseError: the teacher does not support the measurement.
        """

    def close(self) -> None:
        """Close connections and drop pending predictions; the teacher cannot be used afterwards."""

    def begin(self, rows: Sequence[TokenizedExample], length: int | None, encoding: Encoding) -> Begun:
        """Start the prediction of a batch; called from one thread.

        Args:
            rows: rows of one split, at least one.
            length: number of tokens to pad rows to, if the teacher pads; None: the longest row.
            encoding: the encoding of the contract, which `Labelled` predictions use.
        """
