"""Building blocks of configurations: options with help text, and checks of values."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import MisuseError

TaskName = Literal[
    "sequence-classification",
    "causal-lm",
    "token-classification",
    "multi-label-classification",
    "sequence-regression",
    "text-ranking",
    "masked-lm",
    "seq2seq-lm",
    "image-classification",
    "multiple-choice",
    "question-answering",
]


#: The groups of a command's help, in order.
Group = Literal["Data", "Model", "Sampling", "Encoding", "Loss", "Training", "Machine", "Output"]


def option(text: str, default: Any = dataclasses.MISSING, *, group: Group) -> Any:
    """A dataclass field with its help text.

    Args:
        text: may end with "Default: ...", where the default is found out later and the field holds
            None or nothing.
        group: of the command's help.
    """
    metadata = {"help": text, "group": group}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


data_option = partial(option, group="Data")
model_option = partial(option, group="Model")
sampling_option = partial(option, group="Sampling")
encoding_option = partial(option, group="Encoding")
loss_option = partial(option, group="Loss")
training_option = partial(option, group="Training")
machine_option = partial(option, group="Machine")
output_option = partial(option, group="Output")


def flag_name(field_name: str) -> str:
    """The flag or YAML key of a field: `top_k` is `top-k`, `from_` is `from`."""
    return field_name.rstrip("_").replace("_", "-")


def check_positive(flag: str, value: int | None) -> None:
    """A count is at least 1, where it is given.

    Raises:
        MisuseError: it is not.
    """
    if value is not None and value < 1:
        raise MisuseError(f"{flag}: expected at least 1, found {value}")


def parse_rows(text: str | None) -> tuple[int, int | None] | None:
    """`--rows A:B`, `A:` or `:B`.

    Raises:
        MisuseError: it is something else.
    """
    if text is None:
        return None
    start, colon, stop = text.partition(":")
    if colon and (start + stop).isdigit() and (not stop or int(start or 0) < int(stop)):
        return int(start or 0), int(stop) if stop else None
    raise MisuseError(f"--rows: expected A:B with A below B, as 0:1000 or 1000:, found {text!r}")


def parse_part(text: str | None) -> tuple[int, int] | None:
    """`--part I/N`: I and N.

    Raises:
        MisuseError: it is something else.
    """
    if text is None:
        return None
    number, slash, count = text.partition("/")
    if slash and number.isdigit() and count.isdigit() and int(number) < int(count):
        return int(number), int(count)
    raise MisuseError(f"--part: expected I/N with I from 0 to N - 1, as 0/8, found {text!r}")


def parse_bytes(flag: str, text: str) -> int:
    """A size as people write it: 500MB, 1.5 TB; decimal units.

    Raises:
        MisuseError: no number, or another unit.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGTP]?)B?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise MisuseError(f"{flag}: expected a size as 500MB or 100GB, found {text!r}")
    return int(float(found[1]) * 1000 ** " KMGTP".index(found[2].upper() or " "))


def cache_dir_option() -> Any:
    """Where shards of caches behind URLs are kept."""
    return machine_option(
        "Directory for files fetched from a cache behind a URL, and for aligned rows of students with another tokenizer. Default: softlabel in the user's cache directory.",
        None,
    )


def cache_bytes_option() -> Any:
    """How much of them."""
    return machine_option(
        "Caches behind a URL: most bytes to keep on this machine; the least recently used are deleted first.", "20GB"
    )


def name_and_path(item: str) -> tuple[str, str]:
    """Split `NAME=DIR`; of a plain directory the name is its own."""
    name, separator, path = item.partition("=")
    return (Path(item).name, item) if not separator or Path(item).exists() else (name, path)
