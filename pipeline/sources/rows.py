"""Rows of a split as examples; a row that cannot be one is set aside with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from pipeline.errors import BadRowError, SourceError
from pipeline.records import NO_LABEL, BadRow, Columns, Example, Message, Scalar
from pipeline.sources.batches import UNREADABLE, Row, read_rows
from pipeline.sources.columns import input_roles
from pipeline.sources.source import Source

if TYPE_CHECKING:
    from pipeline.sources.labels import LabelMap

_MAX_TOKEN_ID = 2**31 - 1


def read_examples(
    source: Source, split: str, start: int, stop: int, labels: LabelMap | None
) -> Iterator[Example | BadRow]:
    """The rows `[start, stop)` of a split, in order, one item each.

    Args:
        labels: None: class labels are not read.

    Returns:
        Examples with the row's index in the split; a `BadRow` for what no teacher can read: an empty or null input, token labels
        that do not fit the tokens, text that is not valid Unicode.

    Raises:
        SourceError: no such split or rows; while reading, a label that is no class.
    """
    if split not in source.splits:
        raise SourceError(f"{source.name}: no split {split!r}; found {', '.join(source.splits)}")
    rows = len(source.splits[split])
    if not 0 <= start <= stop <= rows:
        raise SourceError(
            f"{source.name}: split {split} has {rows} rows, expected rows {start} to {stop}; is it the same data set?"
        )
    return _examples(source, split, start, stop, labels)


def _examples(source: Source, split: str, start: int, stop: int, labels: LabelMap | None) -> Iterator[Example | BadRow]:
    columns = source.columns
    label_column = columns.label if labels is not None else None
    names = [*input_roles(columns).values(), *columns.keep, *([label_column] if label_column else [])]
    for i, row in enumerate(read_rows(source.splits[split], names, start, stop), start=start):
        try:
            _check_readable(row)
            kept = {name: _kept(name, row[name]) for name in columns.keep}
            example = _example(i, row, columns, kept)
        except BadRowError as error:
            yield BadRow(split, i, str(error))
            continue
        if labels is None or label_column is None:
            yield example
        else:
            label = labels.class_id(row.get(label_column), split=split, row=i)
            yield dataclasses.replace(example, label=label)


def _example(i: int, row: Row, columns: Columns, kept: dict[str, Scalar]) -> Example:
    if columns.messages is not None:
        return Example(i, messages=_messages(columns.messages, row[columns.messages]), kept=kept)
    if columns.prompt is not None and columns.completion is not None:
        prompt = _text(columns.prompt, row[columns.prompt], may_be_empty=True)
        return Example(i, prompt_completion=(prompt, _text(columns.completion, row[columns.completion])), kept=kept)
    if columns.input_ids is not None:
        ids = _integers(columns.input_ids, row[columns.input_ids], lowest=0)
        if not ids:
            raise BadRowError(f"{columns.input_ids} is empty")
        if columns.labels is None:
            return Example(i, input_ids=ids, kept=kept)
        token_labels = _token_labels(columns.labels, row[columns.labels], ids)
        return Example(i, input_ids=ids, token_labels=token_labels, kept=kept)
    assert columns.text is not None  # one_input() saw to it
    pair = None if columns.text_pair is None else _text(columns.text_pair, row[columns.text_pair])
    return Example(i, text=_text(columns.text, row[columns.text]), text_pair=pair, kept=kept)


def _check_readable(row: Row) -> None:
    if UNREADABLE in row.values():
        raise BadRowError("text that is not valid UTF-8")


def _text(name: str, value: object, *, may_be_empty: bool = False) -> str:
    if value is None:
        raise BadRowError(f"{name} is null")
    if not isinstance(value, str):
        raise BadRowError(f"{name}: expected text, found {_kind(value)}")
    if not value and not may_be_empty:
        raise BadRowError(f"{name} is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRowError(f"{name}: text that is not valid Unicode (a lone surrogate)") from None
    return value


def _messages(name: str, value: object) -> tuple[Message, ...]:
    if value is None or value == []:
        raise BadRowError(f"{name} is {'null' if value is None else 'empty'}")
    if not isinstance(value, list):
        raise BadRowError(f"{name}: expected a list of messages, found {_kind(value)}")
    messages = []
    for number, turn in enumerate(value):
        where = f"{name}[{number}]"
        if not isinstance(turn, dict):
            raise BadRowError(f"{where}: expected {{role, content}}, found {_kind(turn)}")
        if turn.get("tool_calls"):
            raise BadRowError(f"{where}: tool calls, which are not supported")
        role = _text(f"{where}.role", turn.get("role"))
        messages.append(Message(role, _text(f"{where}.content", turn.get("content"), may_be_empty=True)))
    return tuple(messages)


def _integers(name: str, value: object, *, lowest: int) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise BadRowError(f"{name} is null" if value is None else f"{name}: expected a list, found {_kind(value)}")
    if None in value:
        raise BadRowError(f"{name} holds a null")
    if value and (min(value) < lowest or max(value) > _MAX_TOKEN_ID):
        raise BadRowError(f"{name}: expected {lowest} to {_MAX_TOKEN_ID}, found {min(value)} to {max(value)}")
    return tuple(value)


def _token_labels(name: str, value: object, ids: tuple[int, ...]) -> tuple[int, ...]:
    labels = _integers(name, value, lowest=NO_LABEL)
    if len(labels) != len(ids):
        raise BadRowError(f"{name}: expected {len(ids)} values, one for each token, found {len(labels)}")
    for position, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (NO_LABEL, token):
            raise BadRowError(
                f"{name}[{position}]: expected {NO_LABEL} or the token there, {token} (not shifted), found {label}"
            )
    return labels


def _kept(name: str, value: object) -> Scalar:
    return _text(name, value, may_be_empty=True) if isinstance(value, str) else cast(Scalar, value)


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
