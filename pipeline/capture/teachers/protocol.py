"""What a teacher is: tokenised rows in, soft labels over V classes and scores out.

`Job.teacher` is one. Engines schedule shards for any teacher; nothing outside this package branches
on which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.capture.teachers.predictions import Predicted
from pipeline.records import Encoding, FirstAnswer, ModelInfo, Tokenization, TokenizedExample

#: Keeps the first answer of a capture beside its plan, and gives the one that is there; None: there
#: is none.
Keep = Callable[[FirstAnswer], FirstAnswer | None]


class Begun(Protocol):
    """A batch that a teacher has begun."""

    def result(self) -> Predicted:
        """Wait for the predictions of the batch.

        Raises:
            torch.OutOfMemoryError: a local model does not fit; the caller says what to do.
            PipelineError: the predictions of no row can be had.
        """


class Teacher(Protocol):
    """The protocol. A teacher is made once in each process, before the contract."""

    @property
    def name(self) -> str:
        """As messages name it."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Makes the token ids of the rows."""

    @property
    def num_classes(self) -> int:
        """V of the soft labels."""

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Names of the V classes; None where class i is token i."""

    @property
    def info(self) -> ModelInfo:
        """What the contract says of it: everything about it that changes a prediction."""

    @property
    def device(self) -> str:
        """Where it runs, as receipts name it."""

    @property
    def longest_input(self) -> int:
        """The longest row that it takes, in tokens."""

    @property
    def embedding_rows(self) -> int:
        """Token ids from here on have no input embedding."""

    @property
    def output_matrix(self) -> Tensor | None:
        """(V, H), for the fidelity report (`forward.output_matrix`); None: there is no report."""

    @property
    def busy(self) -> bool:
        """Whether a batch is to be taken from it before another is begun.

        A local model always is.
        """

    def describe(self, info: ModelInfo) -> str:
        """One line for `--dry-run`: name, size, device.

        Args:
            info: what the contract says of it; for a local model that takes a pass over its
                weights.
        """

    def settle(self, tokenization: Tokenization) -> Tokenization:
        """How rows become tokens, as the contract states it: with what the teacher decides."""

    def check(self, encoding: Encoding, tokenization: Tokenization, *, store_entropy: bool) -> None:
        """Refuse settings that it cannot serve, before anything is written.

        Raises:
            MisuseError: says how to get the same in another way.
        """

    def compare(self, rows: Sequence[TokenizedExample], encoding: Encoding, keep: Keep | None = None) -> None:
        """Check, before the first shard and in every process, that its predictions are sound.

        Args:
            rows: a few rows of the data set; there may be none.
            keep: for a teacher that may change between two processes of a capture; None: nothing is
                kept.

        Raises:
            PipelineError: they are not.
        """

    def fastest_batch_tokens(self, tokenization: Tokenization) -> int:
        """Tokens in a batch, padding included, at which it is fastest: `--auto-batch-tokens`.

        Raises:
            MisuseError: it does not depend on batches.
        """

    def close(self) -> None:
        """Close connections and give up what is not predicted yet; it is not used afterwards."""

    def begin(self, rows: Sequence[TokenizedExample], length: int | None, encoding: Encoding) -> Begun:
        """Begin to predict a batch; called from one thread.

        Args:
            rows: of one split; there is at least one.
            length: to which rows are padded, where the teacher pads; None: the longest.
            encoding: of the contract; it is what `Labelled` predictions have.
        """
