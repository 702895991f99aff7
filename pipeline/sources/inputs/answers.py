"""Answers that stand in a text: the characters of each, from a column as SQuAD has it."""

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
    """Raw values of a column of answers -> characters of the text that they stand in."""

    contract_form: tuple[str, ...] = ()
    """There is nothing to map."""
    several: bool = False

    @classmethod
    def of(cls, source: Source, label_map: Sequence[str] = ()) -> AnswerColumn:
        """The label column of a source.

        Raises:
            SourceError: a column of another type; a label map.
        """
        if label_map:
            raise SourceError(
                f"{source.name}: --label-map is for class labels, and here they are answers; leave it out"
            )
        for split, dataset in source.splits.items():
            check_label(f"{source.name}: split {split}", dataset, source.columns, holds="answers")
        return cls()

    def read(self, value: Any, text: str) -> tuple[tuple[int, int], ...] | None:
        """Characters `[start, end)` of each answer in the text; (): there is none in it; None: not known.

        Args:
            value: {text: texts, answer_start: numbers}, a list of {text, answer_start}, or one of
                them; null: not known.

        Raises:
            BadRowError: not as many texts as numbers, or an answer that does not stand there.
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
    lead = len(answer) - len(answer.lstrip())  # white space at its ends is no part of an answer
    return start + lead, start + len(answer.rstrip())
