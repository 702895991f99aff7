"""Read lists of words, split texts into words, and make the tags of the words of a span."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable

import regex

from pipeline.errors import BadRowError
from pipeline.sources.values import kind_of, read_text

#: Words: each single ideograph or kana, as in BERT's basic tokenizer; a run of letters with their
#: marks and joiners, digits and underscores; and every other character that is not white space.
_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}]\p{M}*"
    r"|[[\p{L}\p{M}\p{N}_\u200c\u200d]--[\p{Han}\p{Hiragana}\p{Katakana}]]+"
    r"|\S",
    regex.VERSION1,
)
OUTSIDE = "O"


def read_words(name: str, value: object) -> tuple[str, ...]:
    """Read a value of a column of words.

    Raises:
        BadRowError: the value is null, no list or empty, or a word is no text, empty or white
            space; the message begins with `name`.
    """
    if not isinstance(value, list):
        raise BadRowError(f"{name} is null" if value is None else f"{name}: expected a list, found {kind_of(value)}")
    if not value:
        raise BadRowError(f"{name} is empty")
    words = tuple(read_text(f"{name}[{i}]", word) for i, word in enumerate(value))
    blank = next((i for i, word in enumerate(words) if word.isspace()), None)
    if blank is not None:
        raise BadRowError(f"{name}[{blank}]: expected a word, found white space")
    return words


def split_words(text: str, cuts: Collection[int] = ()) -> list[tuple[int, int]]:
    """Split a text into words, and return the characters `[start, end)` of each.

    Words are runs of letters and digits; every other character is a word by itself, and so are
    ideographs and kana. Other scripts without spaces, such as Thai, give whole runs; such data
    should be given as lists of words.

    Args:
        cuts: character positions at which words are always divided.
    """
    found: list[tuple[int, int]] = []
    inner = sorted(cuts)
    for match in _WORD.finditer(text):
        bounds = [match.start(), *(cut for cut in inner if match.start() < cut < match.end()), match.end()]
        found += itertools.pairwise(bounds)
    return found


def tags_of(labels: Iterable[str]) -> list[str]:
    """Return the BIO tags of words for spans with these labels."""
    return [OUTSIDE, *(f"{prefix}-{label}" for label in labels for prefix in ("B", "I"))]


def tags_of_span(label: str, count: int, names: Collection[str]) -> list[str]:
    """Return the tags of the words of one span, in the scheme that the model's class names follow.

    The scheme is BIOES, BILOU, BIO, IO, or the label alone. Case and surrounding space are ignored.

    Args:
        label: the label of the span.
        count: number of words in the span.
        names: the model's class names.
    """
    wanted = label.strip().casefold()
    prefixes = {
        prefix.strip().upper()
        for prefix, _, rest in (name.partition("-") for name in names)
        if rest.strip().casefold() == wanted
    }
    if not prefixes:
        return [label] * count
    single = next((prefix for prefix in ("S", "U") if prefix in prefixes), None)
    last = next((prefix for prefix in ("E", "L") if prefix in prefixes), "I")
    first = "B" if "B" in prefixes else "I"
    if count == 1:
        return [f"{single or first}-{label}"]
    return [f"{first}-{label}", *[f"I-{label}"] * (count - 2), f"{last}-{label}"]
