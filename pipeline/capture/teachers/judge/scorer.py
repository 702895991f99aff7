"""What gives log-probabilities of labels after prompts: a local language model, or one behind a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.records import ModelInfo

Labels = Sequence[tuple[int, ...]]


class BegunScores(Protocol):
    """A batch that is begun."""

    def result(self) -> Tensor:
        """(N, V) nats: for each prompt and label the sum of the log-probabilities of the label's tokens.

        NaN where they cannot be had.
        """


class Scorer(Protocol):
    """The protocol."""

    @property
    def name(self) -> str:
        """As messages name it."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Makes the token ids of prompts."""

    @property
    def positions(self) -> int:
        """Tokens of prompt and label that it takes."""

    @property
    def info(self) -> ModelInfo:
        """What the contract says of it, without the prompt."""

    @property
    def device(self) -> str:
        """Where it runs, as receipts name it."""

    @property
    def embedding_rows(self) -> int:
        """Token ids from here on have no input embedding."""

    @property
    def busy(self) -> bool:
        """Whether a batch should be taken from it before another is begun."""

    def describe(self, info: ModelInfo) -> str:
        """One line: name, size, device."""

    def begin(self, prompts: Sequence[np.ndarray], labels: Labels, prefix: np.ndarray) -> BegunScores:
        """Begin to score a batch.

        Args:
            prompts: (T,) int64 each, at least one.
            labels: token ids of each label, at least one.
            prefix: (P,) int64, what most prompts begin with; there is at least one token behind it.
        """

    def compare(self, prompts: Sequence[np.ndarray], labels: Labels, prefix: np.ndarray) -> None:
        """Check, before the first shard, that the scores are sound.

        Args:
            prompts: two short ones, of different lengths.

        Raises:
            PipelineError: they are not.
        """

    def close(self) -> None:
        """Let go of connections."""
