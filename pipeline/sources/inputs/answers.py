"""Read answers in a text as character spans, from a column in the format of SQuAD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import BadRowError, SourceError
from pipeline.sources.columns import check_label
from pipeline.sources.source import Source
from pipeline.sources.values import fields_of, kind_of


@dataclass(frozen=True, slots=True)
class AnswerColumn:
    """Reads raw values of a column of answers as character spans of the text."""

    contract_form: tuple[str, ...] = ()
    """Empty: answers have no label map."""
    several: bool = False
    """As in `ScoreColumn`."""

    @classmethod
    def of(cls, source: Source, label_map: Sequence[str] = ()) -> AnswerColumn:
        """Make a reader of a source's label column.

        Raises:
            SourceError: the column has another type, or a label map is given.
        """
        if label_map:
            raise SourceError(
                f"{source.name}: --label-map is for class labels, and here they are answers; leave it out"
            )
        for split, dataset in source.splits.items():
            check_label(f"{source.name}: split {split}", dataset, source.columns, holds="answers")
        return cls()

    def read(self, value: Any, text: str) -> tuple[tuple[int, int], ...] | None:
        """Return the characters `[start, end)` of each answer in the text.

        Args:
            value: {text: texts, answer_start: numbers}, a list of {text, answer_start}, or one of
                them; null: not known.

        Returns:
            (): the text has no answer; None: the answers are not known.

        Raises:
            BadRowError: the numbers of texts and starts differ, or the text does not have an answer
                at its start.
        """
        if value is None:
            return None
        if isinstance(value, Mapping) and value.get("text") is None and value.get("answer_start") is None:
            return None
        if value == []:
            return ()
        texts, starts = fields_of(value, ("text", "answer_start")) or (None, None)
        if isinstance(texts, str):  # one answer
            texts, starts = [texts], [starts]
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise BadRowError(
                f"expected answers of {{text, answer_start}}, as many texts as numbers, found {kind_of(value)}"
            )
        return tuple(_span(i, answer, start, text) for i, (answer, start) in enumerate(zip(texts, starts, strict=True)))


def _span(number: int, answer: object, start: object, text: str) -> tuple[int, int]:
    if isinstance(start, float) and start.is_integer():
        start = int(start)
    if not isinstance(answer, str) or not answer.strip() or isinstance(start, bool) or not isinstance(start, int):
        raise BadRowError(
            f"answer {number}: expected a text and the number of its first character, found {answer!r} and {start!r}"
        )
    there = text[max(start, 0) : max(start, 0) + len(answer)]
    if start < 0 or there != answer:
        raise BadRowError(f"answer {number}: expected {answer[:60]!r} at character {start}, found {there[:60]!r}")
    lead = len(answer) - len(answer.lstrip())  # an answer does not include white space at its ends
    return start + lead, start + len(answer.rstrip())
