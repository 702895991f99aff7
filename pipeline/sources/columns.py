"""Assign columns to roles (input, label, group, ...) and check that their types fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from pipeline.errors import MisuseError, SourceError
from pipeline.records import Columns, LabelColumn

if TYPE_CHECKING:
    from pipeline.sources.files.joined import JoinedRows, Rows

#: Field of `Columns` -> its command-line flag, for the columns that a model reads.
_INPUT_FLAGS = {
    "text": "--text-column",
    "text_pair": "--text-pair-column",
    "image": "--image-column",
    "words": "--words-column",
    "messages": "--messages-column",
    "prompt": "--prompt-column",
    "completion": "--completion-column",
    "input_ids": "--input-ids-column",
    "labels": "--labels-column",
}
#: Prefix of the roles of choice columns.
CHOICES = "choices:"
#: Columns without a flag: they are read together with token ids and chats if a data set has them.
ATTENTION_MASK, TOOLS = "attention_mask", "tools"
_TEXT_ROLES = ("text", "text_pair", "prompt", "completion")
_SCALARS = ("text", "integers", "floats", "booleans", "class labels", "nulls")


def one_input(columns: Columns) -> Columns:
    """Return the columns with exactly one kind of input, and each kept column once.

    `text` is dropped if there is another input.

    Raises:
        MisuseError: there is no input, more than one, or only a part of one.
    """
    if (columns.prompt is None) != (columns.completion is None):
        raise MisuseError("--prompt-column and --completion-column go together; give both or neither")
    if columns.labels is not None and columns.input_ids is None:
        raise MisuseError("--labels-column goes with --input-ids-column; for class labels use --label-column")
    kinds = (columns.image, columns.words, columns.messages, columns.prompt, columns.input_ids)
    others = [name for name in kinds if name is not None]
    if columns.text_pair is not None and (others or columns.text is None):
        raise MisuseError("--text-pair-column goes with --text-column, and with no other kind of input")
    if len(set(columns.choices)) < len(columns.choices):
        raise MisuseError("--choices-column: expected each column once")
    if columns.choices and (others or columns.text is None):
        raise MisuseError("--choices-column goes with --text-column, and with no other kind of input")
    if len(others) > 1:
        raise MisuseError(f"one kind of input at a time: found the columns {', '.join(others)}")
    if not others and columns.text is None:
        raise MisuseError("no input: name a column with --text-column, or with one of the flags for other inputs")
    text = None if others else columns.text
    return dataclasses.replace(columns, text=text, keep=tuple(dict.fromkeys(columns.keep)))


def input_roles(columns: Columns) -> dict[str, str]:
    """Return the input columns by role, in a fixed order, without labels and kept columns."""
    found = {role: getattr(columns, role) for role in _INPUT_FLAGS}
    several = {f"{CHOICES}{i}": name for i, name in enumerate(columns.choices)}
    return {role: name for role, name in {**found, **several}.items() if name is not None}


def side_roles(dataset: Rows, columns: Columns) -> dict[str, str]:
    """Return the optional columns that are read with the inputs, by role, if they exist.

    They are `attention_mask` for token ids and `tools` for chats.
    """
    if columns.input_ids is not None and columns.labels != ATTENTION_MASK:
        name = ATTENTION_MASK
    elif is_chat(dataset, columns):
        name = TOOLS
    else:
        return {}
    return {name: name} if name in dataset.column_names else {}


def is_chat(dataset: Rows, columns: Columns) -> bool:
    """Return whether the input is chats: messages, or prompts that are not plain text."""
    chat = columns.messages or columns.prompt
    return chat is not None and describe(dataset.features.get(chat)) != "text"


def used_roles(columns: Columns) -> dict[str, str]:
    """Return all columns that are named, by role: inputs, label, group and kept columns.

    The role of a kept column is `keep:NAME`.
    """
    label = {} if columns.label is None else {"label": columns.label}
    group = {} if columns.group is None else {"group": columns.group}
    return {**input_roles(columns), **label, **group, **{f"keep:{name}": name for name in columns.keep}}


def check_inputs(where: str, dataset: Rows, columns: Columns, shared: Collection[str] = ()) -> None:
    """Check that the input columns exist and that their types fit their roles.

    Args:
        shared: columns that other files of the data set have.

    Raises:
        SourceError: a column is missing or of the wrong type; the message begins with `where`.
    """
    for role, name in input_roles(columns).items():
        _require(where, dataset, name, _INPUT_FLAGS.get(role, "--choices-column"), shared)
        found = describe(dataset.features[name])
        if role in ("prompt", "completion") and _is_chat(dataset.features[name], found):
            continue
        if role in _TEXT_ROLES:
            _check_text(where, role, name, found)
        elif role.startswith(CHOICES):
            _check_choices(where, name, dataset.features[name], found, several=len(columns.choices) > 1)
        elif role == "image":
            _check_images(where, name, dataset.features[name], found)
        elif role == "words":
            if found != "lists of text":
                raise SourceError(
                    f"{where}: column {name!r} (--words-column): expected lists of words, found {found}; name another column, or make lists of it (a CSV file holds none; JSON Lines and Parquet do)"
                )
        elif role == "messages":
            _check_messages(where, name, dataset.features[name], found)
        elif found != "lists of integers":
            raise SourceError(
                f"{where}: column {name!r} ({_INPUT_FLAGS[role]}): expected lists of integers, found {found}; name another column"
            )


def check_alike(where: str, dataset: JoinedRows, columns: Columns) -> None:
    """Check that the files of one split agree on class names and on whether the input is chats.

    Raises:
        SourceError: two files differ.
    """
    labelled = [part for i, part in enumerate(dataset.parts) if columns.label and dataset.holds(i, columns.label)]
    names = {class_names(part.features[columns.label]) for part in labelled}
    if len(names) > 1:
        raise SourceError(
            f"{where}: column {columns.label!r}: files have different class names for the same numbers; write names instead of numbers"
        )
    chat = columns.messages or columns.prompt
    if len({is_chat(part, columns) for part in dataset.parts if chat in part.column_names}) > 1:
        raise SourceError(f"{where}: column {chat!r}: expected chats or texts in all files, found both; convert some")


def check_kept(where: str, dataset: Rows, columns: Columns) -> None:
    """Check that the kept columns exist and hold one scalar per row.

    Raises:
        SourceError: a column is missing, or holds lists, structs, dates or bytes.
    """
    for name in columns.keep:
        _require(where, dataset, name, "--keep-column")
        found = describe(dataset.features[name])
        if found not in _SCALARS:
            raise SourceError(
                f"{where}: column {name!r} (--keep-column): expected text, numbers or booleans, found {found}; drop the flag, or convert the column"
            )


def check_label(where: str, dataset: Rows, columns: Columns, *, holds: LabelColumn = "class") -> None:
    """Check the type of the label column, if the data set has it.

    With a column of words, it must hold lists of labels. With a column of texts, it may hold spans.

    Args:
        holds: what the column must hold.

    Raises:
        SourceError: the column has another type.
    """
    name = columns.label
    if name is None or name not in dataset.column_names:
        return
    found = describe(dataset.features[name])
    if columns.words is not None:
        if found != "nulls" and found not in [f"lists of {scalar}" for scalar in _SCALARS]:
            raise SourceError(
                f"{where}: column {name!r} (--label-column): expected a list of names or class ids, one a word, found {found}; name another column"
            )
    elif holds == "scores":
        numbers = ("floats", "integers", "nulls", "booleans")
        if found not in (*numbers, *(f"lists of {scalar}" for scalar in numbers)):
            raise SourceError(
                f"{where}: column {name!r} (--label-column): expected a number a row, or a list of as many as the model has outputs, found {found}; name another column, or make numbers of it"
            )
    elif holds == "answers":
        if not holds_answers(dataset.features[name]):
            raise SourceError(
                f"{where}: column {name!r} (--label-column): expected answers of {{text, answer_start}}, as SQuAD has them, found {found}; name another column"
            )
    elif holds == "classes":
        if found != "nulls" and found not in [f"lists of {scalar}" for scalar in _SCALARS]:
            raise SourceError(
                f"{where}: column {name!r} (--label-column): expected a list of a row's labels, or a list of one boolean or float per class, found {found}; "
                "name another column, or make lists of it"
            )
    elif found not in _SCALARS and not (columns.text is not None and holds_spans(dataset, name)):
        raise SourceError(
            f"{where}: column {name!r} (--label-column): expected one name or class id a row, found {found}; name another column"
        )


def check_group(where: str, dataset: Rows, columns: Columns) -> None:
    """Check that the group column, if one is named, exists and holds one name or number per row.

    Raises:
        SourceError: the column is missing or of another type.
    """
    if columns.group is None:
        return
    _require(where, dataset, columns.group, "--group-column")
    found = describe(dataset.features[columns.group])
    if found not in ("text", "integers", "class labels"):
        raise SourceError(
            f"{where}: column {columns.group!r} (--group-column): expected text or whole numbers, found {found}; name another column"
        )


def holds_spans(dataset: Rows, name: str) -> bool:
    """Return whether a column holds lists of {start, end, label}, spans of characters of a text."""
    feature = dataset.features.get(name)
    item: Any = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
    return isinstance(item, dict) and {"start", "end", "label"} <= set(item)


def holds_answers(feature: Any) -> bool:
    """Return whether a type can hold answers {text, answer_start}, as SQuAD has them.

    A row may hold a struct of lists, a list of structs, or a single struct. Columns of nulls or of
    mixed types are accepted too.
    """
    item: Any = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
    structs = [each for each in (feature, item) if isinstance(each, dict)]
    named = any({"text", "answer_start"} <= set(each) for each in structs)
    return named or describe(feature) in (
        "nulls",
        "lists of nulls",
        "values of mixed types",
        "lists of values of mixed types",
    )


def holds_flags(dataset: Rows, name: str) -> bool:
    """Return whether a column holds lists of one boolean or float per class."""
    return describe(dataset.features.get(name)) in ("lists of booleans", "lists of floats")


def class_names(feature: Any) -> tuple[str, ...]:
    """Return the class names of a `ClassLabel` column, or of lists or spans with such labels.

    For other columns, return ().
    """
    if isinstance(feature, dict):
        return class_names(feature["label"]) if "label" in feature else ()
    item = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    return tuple(getattr(feature, "names", None) or ()) or (() if item is None else class_names(item))


def describe(feature: Any) -> str:
    """Describe a column type in words, such as `text`, `integers` or `structs of role, content`."""
    import datasets

    if isinstance(feature, datasets.Value):
        dtype = feature.dtype
        if dtype in ("string", "large_string", "string_view"):
            return "text"
        names = {"int": "integers", "uint": "integers", "float": "floats", "bool": "booleans", "null": "nulls"}
        return names.get(dtype.rstrip("0123456789"), f"{dtype} values")
    if holds_images(feature):
        return "images"
    if isinstance(feature, datasets.ClassLabel):
        return "class labels"
    if isinstance(feature, datasets.Json):
        return "values of mixed types"
    if isinstance(feature, datasets.List | datasets.LargeList):
        return f"lists of {describe(feature.feature)}"
    if isinstance(feature, list) and feature:
        return f"lists of {describe(feature[0])}"
    if isinstance(feature, dict):
        return f"structs of {', '.join(feature)}"
    return f"{type(feature).__name__} values"


def _require(where: str, dataset: Rows, name: str, flag: str, shared: Collection[str] = ()) -> None:
    if name not in dataset.column_names:
        advice = (
            "rename a column, so that all files have the same" if name in shared else f"name the right one with {flag}"
        )
        found = ", ".join(map(_short, dataset.column_names))
        raise SourceError(f"{where}: no column {name!r}; found {found}; {advice}")


def _short(name: str) -> str:
    """Shorten a name that is a whole row, of a file without a first line of names."""
    line = " ".join(name.split())
    return line if len(line) <= 60 else f"{line[:57]}..."


def _check_text(where: str, role: str, name: str, found: str) -> None:
    if found == "text":
        return
    flag = _INPUT_FLAGS[role]
    if found == "nulls":
        hint = "every row is empty; name another column"
    elif found.startswith("timestamp"):
        hint = (
            "JSON text that looks like a date is read as one; keep it as text in CSV or Parquet, or name another column"
        )
    else:
        hint = "convert it to text, or name another column"
    raise SourceError(f"{where}: column {name!r} ({flag}): expected text, found {found}; {hint}")


def _check_choices(where: str, name: str, feature: Any, found: str, *, several: bool) -> None:
    item: Any = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
    named = any(isinstance(each, dict) and "text" in each for each in (feature, item))
    if found != "text" if several else not (named or found in ("lists of text", "values of mixed types")):
        expected = "text in each of several columns" if several else "lists of text, or of {text, label}"
        raise SourceError(
            f"{where}: column {name!r} (--choices-column): expected {expected}, found {found}; "
            + ("write the choices as text in JSON Lines or Parquet" if several else "name another column")
        )


def holds_images(feature: Any) -> bool:
    """Return whether a column holds encoded images: `datasets.Image`, {bytes, path} or bytes."""
    import datasets

    if isinstance(feature, dict):
        return {"bytes", "path"} <= set(feature)
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _check_images(where: str, name: str, feature: Any, found: str) -> None:
    if not holds_images(feature) and found != "text":
        raise SourceError(
            f"{where}: column {name!r} (--image-column): expected images, bytes or paths of files, found {found}; name another column"
        )


def _check_messages(where: str, name: str, feature: Any, found: str) -> None:
    if not _is_chat(feature, found):
        raise SourceError(
            f"{where}: column {name!r} (--messages-column): expected lists of {{role, content}}, found {found}; name another column"
        )


def _is_chat(feature: Any, found: str) -> bool:
    """Return whether a column can hold chats: lists of {role, content} or {from, value}.

    Columns of mixed types are accepted; their rows are checked when they are read.
    """
    if found in ("values of mixed types", "lists of values of mixed types"):
        return True
    turn: Any = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
    return isinstance(turn, dict) and ({"role", "content"} <= set(turn) or {"from", "value"} <= set(turn))
