"""Label scores from a server: one request of token ids per prompt and label."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.capture.teachers.judge.scorer import Labels
from pipeline.capture.teachers.predictions import Labelled
from pipeline.capture.teachers.protocol import Begun
from pipeline.capture.teachers.served import ServedTeacher
from pipeline.records import ModelInfo, TokenizedExample, TopK

logger = logging.getLogger(__name__)

#: Servers return the most likely token next to each requested one; it is not used.
_ASKED = TopK(1, (1.0,))


@dataclass(frozen=True, slots=True)
class ServedScorer:
    """A scorer with a served teacher; see `Scorer` for the members."""

    teacher: ServedTeacher

    @property
    def name(self) -> str:
        """Name for messages."""
        return self.teacher.name

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that `--teacher` names."""
        return self.teacher.tokenizer

    @property
    def positions(self) -> int:
        """The largest number of tokens that the server accepts."""
        return self.teacher.longest_input

    @property
    def info(self) -> ModelInfo:
        """The model's entry in the contract, from the server."""
        return self.teacher.info

    @property
    def device(self) -> str:
        """Name and version of the server's software."""
        return self.teacher.device

    @property
    def embedding_rows(self) -> int:
        """Number of rows of the input embedding, from the configuration or the tokenizer."""
        return self.teacher.embedding_rows

    @property
    def busy(self) -> bool:
        """Whether enough requests are queued to keep the server busy; see `ServedTeacher.busy`."""
        return self.teacher.busy

    def describe(self, info: ModelInfo) -> str:
        """Return the model, software and addresses."""
        return self.teacher.describe(info)

    def begin(self, prompts: Sequence[np.ndarray], labels: Labels, prefix: np.ndarray) -> _Asked:
        """Send a request per prompt and label; servers cache the prefixes that prompts share."""
        rows = [_row(i, prompt, label) for i, prompt in enumerate(prompts) for label in labels]
        return _Asked(self.teacher.begin(rows, None, _ASKED), rows, len(labels))

    def compare(self, prompts: Sequence[np.ndarray], labels: Labels, prefix: np.ndarray) -> None:
        """Compare repeated answers; see `ServedTeacher.compare`."""
        self.teacher.compare([_row(0, prompts[0], labels[0])], _ASKED)

    def close(self) -> None:
        """Cancel pending requests and close the connections."""
        self.teacher.close()


@dataclass(frozen=True, slots=True)
class _Asked:
    begun: Begun
    rows: Sequence[TokenizedExample]
    """One row per label for each prompt."""
    num_labels: int

    def result(self) -> Tensor:
        """Wait for the (N, V) float32 scores; NaN for a prompt that the server refuses."""
        found = self.begun.result()
        assert isinstance(found, Labelled)
        for reason in list(dict.fromkeys(found.bad.values()))[:1]:
            logger.warning("a prompt was refused: %s", reason)
        counts = [row.num_positions for i, row in enumerate(self.rows) if i not in found.bad]
        sums = iter([part.sum() for part in torch.split(-found.scores.nll.double(), counts)])
        nan = torch.tensor(torch.nan, dtype=torch.float64)
        scores = torch.stack([nan if i in found.bad else next(sums) for i in range(len(self.rows))])
        return scores.float().view(-1, self.num_labels)


def _row(number: int, prompt: np.ndarray, label: tuple[int, ...]) -> TokenizedExample:
    """Build a row of prompt and label; the positions before the label's tokens are supervised."""
    ids = np.concatenate([prompt, np.asarray(label, dtype=np.int64)]).astype(np.int32)
    supervised = np.zeros(len(ids), dtype=np.bool_)
    supervised[len(prompt) - 1 : -1] = True
    return TokenizedExample(number, 0, ids, supervised)
