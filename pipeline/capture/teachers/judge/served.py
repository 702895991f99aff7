"""Labels scored by a language model behind a server: a request for each prompt and label, of token ids."""

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

#: A server gives the most likely token with each one that is asked for; it is not used.
_ASKED = TopK(1, (1.0,))


@dataclass(frozen=True, slots=True)
class ServedScorer:
    """A served teacher of tokens; the protocol of scorers says what each member is."""

    teacher: ServedTeacher

    @property
    def name(self) -> str:
        """As messages name it."""
        return self.teacher.name

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the directory or hub name that `--teacher` gives."""
        return self.teacher.tokenizer

    @property
    def positions(self) -> int:
        """What the server takes."""
        return self.teacher.longest_input

    @property
    def info(self) -> ModelInfo:
        """What the server says of itself."""
        return self.teacher.info

    @property
    def device(self) -> str:
        """The server's software."""
        return self.teacher.device

    @property
    def embedding_rows(self) -> int:
        """Of the model, as its configuration or its tokenizer has it."""
        return self.teacher.embedding_rows

    @property
    def busy(self) -> bool:
        """As many requests wait as are asked at once."""
        return self.teacher.busy

    def describe(self, info: ModelInfo) -> str:
        """Model, software and addresses."""
        return self.teacher.describe(info)

    def begin(self, prompts: Sequence[np.ndarray], labels: Labels, prefix: np.ndarray) -> _Asked:
        """Ask for every label behind every prompt; servers keep the beginnings that prompts share by themselves."""
        rows = [_row(i, prompt, label) for i, prompt in enumerate(prompts) for label in labels]
        return _Asked(self.teacher.begin(rows, None, _ASKED), rows, len(labels))

    def compare(self, prompts: Sequence[np.ndarray], labels: Labels, prefix: np.ndarray) -> None:
        """As a served teacher compares its answers."""
        self.teacher.compare([_row(0, prompts[0], labels[0])], _ASKED)

    def close(self) -> None:
        """Give up what is not answered yet."""
        self.teacher.close()


@dataclass(frozen=True, slots=True)
class _Asked:
    begun: Begun
    rows: Sequence[TokenizedExample]
    """Of each prompt a row for each label."""
    num_labels: int

    def result(self) -> Tensor:
        """(N, V) float32; a prompt that the server refuses has NaN."""
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
    """Prompt and label, with the positions before the label's tokens supervised."""
    ids = np.concatenate([prompt, np.asarray(label, dtype=np.int64)]).astype(np.int32)
    supervised = np.zeros(len(ids), dtype=np.bool_)
    supervised[len(prompt) - 1 : -1] = True
    return TokenizedExample(number, 0, ids, supervised)
