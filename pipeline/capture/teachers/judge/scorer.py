"""The `Scorer` protocol: log-probabilities of labels after prompts.

Scorers are a local language model and one behind a server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.records import ModelInfo

Labels = Sequence[tuple[int, ...]]


class BegunScores(Protocol):
    """A batch that a scorer has started."""

    def result(self) -> Tensor:
        """Wait for the (N, V) sums of the log-probabilities of each label's tokens, in nats.

        NaN where a score is not available.
        """


class Scorer(Protocol):
    """A language model that scores labels after prompts."""

    @property
    def name(self) -> str:
        """Name for messages."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the prompts."""

    @property
    def positions(self) -> int:
        """The largest number of tokens of prompt and label that it accepts."""

    @property
    def info(self) -> ModelInfo:
        """The model's entry in the contract, without the prompt."""

    @property
    def device(self) -> str:
        """The device, as stored in receipts."""

    @property
    def embedding_rows(self) -> int:
        """Number of rows of the input embedding; larger token ids have no embedding."""

    @property
    def busy(self) -> bool:
        """Whether the caller must take the result of a batch before it starts another one."""

    def describe(self, info: ModelInfo) -> str:
        """Return one line: name, size, device."""

    def begin(self, prompts: Sequence[np.ndarray], labels: Labels, prefix: np.ndarray) -> BegunScores:
        """Start to score a batch.

        Args:
            prompts: (T,) int64 each, at least one prompt.
            labels: token ids of each label, at least one per label.
            prefix: (P,) int64, the beginning of most prompts, which are longer than it.
        """

    def compare(self, prompts: Sequence[np.ndarray], labels: Labels, prefix: np.ndarray) -> None:
        """Check the scores before the first shard.

        Args:
            prompts: two short prompts of different lengths.

        Raises:
            PipelineError: the check fails.
        """

    def close(self) -> None:
        """Close connections."""
