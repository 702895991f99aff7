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


#: The groups of options in a command's help, in order.
Group = Literal["Data", "Model", "Sampling", "Encoding", "Loss", "Training", "Machine", "Output"]


def option(text: str, default: Any = dataclasses.MISSING, *, group: Group) -> Any:
    """A dataclass field with its help text.

    Args:
        text: the help text; ends with "Default: ..." if the default is computed later and the field
            holds None or an empty value.
        default: the default value; MISSING: the option is required.
        group: the group of the option in the command's help.
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
    """Check that a count is None or at least 1.

    Raises:
        MisuseError: it is less than 1.
    """
    if value is not None and value < 1:
        raise MisuseError(f"{flag}: expected at least 1, found {value}")


def parse_rows(text: str | None) -> tuple[int, int | None] | None:
    """Parse `--rows`: `A:B`, `A:` or `:B`.

    Returns:
        Start and stop; stop None: to the end. None: `text` is None.

    Raises:
        MisuseError: the text has another form.
    """
    if text is None:
        return None
    start, colon, stop = text.partition(":")
    if colon and (start + stop).isdigit() and (not stop or int(start or 0) < int(stop)):
        return int(start or 0), int(stop) if stop else None
    raise MisuseError(f"--rows: expected A:B with A below B, as 0:1000 or 1000:, found {text!r}")


def parse_part(text: str | None) -> tuple[int, int] | None:
    """Parse `--part I/N` to I and N; None: `text` is None.

    Raises:
        MisuseError: the text has another form.
    """
    if text is None:
        return None
    number, slash, count = text.partition("/")
    if slash and number.isdigit() and count.isdigit() and int(number) < int(count):
        return int(number), int(count)
    raise MisuseError(f"--part: expected I/N with I from 0 to N - 1, as 0/8, found {text!r}")


def parse_bytes(flag: str, text: str) -> int:
    """Parse a size in decimal units, such as 500MB or 1.5 TB, to bytes.

    Raises:
        MisuseError: the text is not a positive number with a known unit.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGTP]?)B?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise MisuseError(f"{flag}: expected a size as 500MB or 100GB, found {text!r}")
    return int(float(found[1]) * 1000 ** " KMGTP".index(found[2].upper() or " "))


def cache_dir_option() -> Any:
    """The option `--cache-dir`: directory for shards of caches behind URLs."""
    return machine_option(
        "Directory for files fetched from a cache behind a URL, and for aligned rows of students with another tokenizer. Default: softlabel in the user's cache directory.",
        None,
    )


def cache_bytes_option() -> Any:
    """The option `--cache-bytes`: maximum size of that directory's shards."""
    return machine_option(
        "Caches behind a URL: most bytes to keep on this machine; the least recently used are deleted first.", "20GB"
    )


def name_and_path(item: str) -> tuple[str, str]:
    """Split `NAME=DIR` into name and path; the name of a plain DIR is its last component."""
    name, separator, path = item.partition("=")
    return (Path(item).name, item) if not separator or Path(item).exists() else (name, path)
