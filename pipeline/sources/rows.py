"""Read the rows of a split as examples; a row that cannot be one becomes a `BadRow`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import cast

from pipeline.errors import BadRowError, SourceError
from pipeline.records import NO_LABEL, BadRow, Columns, Example, Scalar
from pipeline.sources.batches import UNREADABLE, Row, read_rows
from pipeline.sources.columns import ATTENTION_MASK, TOOLS, holds_spans, input_roles, side_roles
from pipeline.sources.inputs.answers import AnswerColumn
from pipeline.sources.inputs.chats import read_messages, read_tools
from pipeline.sources.inputs.choices import read_choice, read_choices
from pipeline.sources.inputs.images import read_image
from pipeline.sources.inputs.words import read_words
from pipeline.sources.scores import Labels, ScoreColumn
from pipeline.sources.source import Source
from pipeline.sources.values import kind_of, read_text
from pipeline.sources.word_labels import flags, span_labels, word_labels

_MAX_TOKEN_ID = 2**31 - 1


def read_examples(
    source: Source, split: str, start: int, stop: int, labels: Labels | None
) -> Iterator[Example | BadRow]:
    """Read the rows `[start, stop)` of a split, in order, one item per row.

    Args:
        labels: reads the label column; None: class labels and scores are not read.

    Returns:
        Examples with the row's index in the split. A row that no teacher can read becomes a
        `BadRow`: an empty or null input, token labels that do not fit the tokens, or text that is
        not valid Unicode.

    Raises:
        SourceError: the split or the rows do not exist; while reading, a label is not a class.
    """
    if split not in source.splits:
        raise SourceError(f"{source.name}: no split {split!r}; found {', '.join(source.splits)}")
    rows = len(source.splits[split])
    if not 0 <= start <= stop <= rows:
        raise SourceError(
            f"{source.name}: split {split} has {rows} rows, expected rows {start} to {stop}; is it the same data set?"
        )
    return _examples(source, split, start, stop, labels)


def _examples(source: Source, split: str, start: int, stop: int, labels: Labels | None) -> Iterator[Example | BadRow]:
    columns = source.columns
    label_column = columns.label if labels is not None or columns.choices else None
    dataset = source.splits[split]
    beside = side_roles(dataset, columns).values()
    by_spans = label_column is not None and holds_spans(dataset, label_column)
    more = [name for name in (label_column, columns.group) if name is not None]
    names = [*input_roles(columns).values(), *beside, *columns.keep, *more]
    for i, row in enumerate(read_rows(dataset, names, start, stop), start=start):
        try:
            _check_readable(row)
            kept = {name: _kept(name, row[name]) for name in columns.keep}
            example = _example(i, row, source, kept)
        except BadRowError as error:
            yield BadRow(split, i, str(error))
            continue
        if labels is None or (label_column is None and not labels.several):
            yield example
        else:
            try:
                value = None if label_column is None else row.get(label_column)
                labelled = _labelled(example, value, labels, by_spans=by_spans, split=split)
                yield _grouped(labelled, row, columns, labels, split)
            except _GroupError as error:
                yield BadRow(split, i, f"{columns.group}: {error}")
            except BadRowError as error:
                yield BadRow(split, i, f"{label_column}: {error}")


def _labelled(example: Example, value: object, labels: Labels, *, by_spans: bool, split: str) -> Example:
    """Return the example with the value of its label column.

    Raises:
        BadRowError: the labels do not fit the words or the text.
        SourceError: a label is not a class.
    """
    number = example.source_row
    if isinstance(labels, ScoreColumn):
        return dataclasses.replace(example, scores=labels.read(value))
    if isinstance(labels, AnswerColumn):
        return dataclasses.replace(example, answers=labels.read(value, example.text_pair or ""))
    if example.words is not None:
        return dataclasses.replace(example, word_labels=word_labels(labels, value, example.words, split, number))
    if by_spans and example.text is not None:
        words, found = span_labels(labels, value, example.text, split, number)
        return dataclasses.replace(example, words=words, word_labels=found)
    if labels.several:
        return dataclasses.replace(example, flags=flags(labels, value, split, number))
    return dataclasses.replace(example, label=labels.class_id(value, split=split, row=number))


class _GroupError(BadRowError):
    """An invalid value in the group column, which gives the list of a row."""


def _grouped(example: Example, row: Row, columns: Columns, labels: Labels, split: str) -> Example:
    """Return the example with its list, if rows are ranked."""
    if columns.group is None or not isinstance(labels, ScoreColumn):
        return example
    try:
        return dataclasses.replace(example, group=labels.list_of(row[columns.group], split))
    except BadRowError as error:
        raise _GroupError(str(error)) from None


def _example(i: int, row: Row, source: Source, kept: dict[str, Scalar]) -> Example:
    columns = source.columns
    if columns.messages is not None:
        messages = read_messages(columns.messages, row[columns.messages])
        return Example(i, messages=messages, tools=read_tools(TOOLS, row.get(TOOLS)), kept=kept)
    if columns.prompt is not None and columns.completion is not None:
        return _prompt_and_completion(i, row, columns.prompt, columns.completion, kept)
    if columns.input_ids is not None:
        ids = _integers(columns.input_ids, row[columns.input_ids], lowest=0)
        if not ids:
            raise BadRowError(f"{columns.input_ids} is empty")
        token_labels = None if columns.labels is None else _token_labels(columns.labels, row[columns.labels], ids)
        if ATTENTION_MASK in row and columns.labels != ATTENTION_MASK:
            part = _attended(ATTENTION_MASK, row[ATTENTION_MASK], ids)
            ids, token_labels = ids[part], None if token_labels is None else token_labels[part]
        return Example(i, input_ids=ids, token_labels=token_labels, kept=kept)
    if columns.image is not None:
        return Example(
            i, image=read_image(columns.image, row[columns.image], source.directory, source.place), kept=kept
        )
    if columns.words is not None:
        return Example(i, words=read_words(columns.words, row[columns.words]), kept=kept)
    assert columns.text is not None  # one_input() ensures it
    pair = None if columns.text_pair is None else read_text(columns.text_pair, row[columns.text_pair])
    if columns.choices:
        texts, names = read_choices(columns.choices, row)
        label = None if columns.label is None else read_choice(columns.label, row.get(columns.label), texts, names)
        text = read_text(columns.text, row[columns.text])
        return Example(i, text=text, text_pair=pair, choices=texts, label=label, kept=kept)
    return Example(i, text=read_text(columns.text, row[columns.text]), text_pair=pair, kept=kept)


def _prompt_and_completion(
    i: int, row: Row, prompt_name: str, completion_name: str, kept: dict[str, Scalar]
) -> Example:
    """Make an example of a prompt and a completion.

    Two lists of turns become one chat, in which only the completion's turns are trained on.
    """
    if not isinstance(row[prompt_name], list):
        prompt = read_text(prompt_name, row[prompt_name], may_be_empty=True)
        return Example(i, prompt_completion=(prompt, read_text(completion_name, row[completion_name])), kept=kept)
    context = [dataclasses.replace(turn, learnt=False) for turn in read_messages(prompt_name, row[prompt_name])]
    answer = read_messages(completion_name, row[completion_name])
    return Example(i, messages=(*context, *answer), tools=read_tools(TOOLS, row.get(TOOLS)), kept=kept)


def _attended(name: str, value: object, ids: tuple[int, ...]) -> slice:
    """Return the slice of the tokens that are not padding; padding may be on both sides.

    Raises:
        BadRowError: the attention mask does not fit the tokens, or has a 0 between two 1.
    """
    mask = _integers(
        name, [int(m) if isinstance(m, bool) else m for m in value] if isinstance(value, list) else value, lowest=0
    )
    if len(mask) != len(ids) or set(mask) - {0, 1}:
        raise BadRowError(
            f"{name}: expected {len(ids)} values of 0 or 1, one per token, found {len(mask)} values of {sorted(set(mask))[:4]}"
        )
    if 1 not in mask:
        raise BadRowError(f"{name}: expected a 1, found {len(mask)} times 0")
    first, last = mask.index(1), len(mask) - 1 - mask[::-1].index(1)
    if 0 in mask[first:last]:
        hole = mask.index(0, first)
        raise BadRowError(
            f"{name}[{hole}]: expected 0 only at the beginning and the end, found 0 between two values of 1"
        )
    return slice(first, last + 1)


def _check_readable(row: Row) -> None:
    if UNREADABLE in row.values():
        raise BadRowError("text that is not valid UTF-8")


def _integers(name: str, value: object, *, lowest: int) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise BadRowError(f"{name} is null" if value is None else f"{name}: expected a list, found {kind_of(value)}")
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
    return read_text(name, value, may_be_empty=True) if isinstance(value, str) else cast(Scalar, value)
