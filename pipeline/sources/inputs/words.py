"""Words: lists of them as rows hold them, texts split into them, and the tags that the words of a span get."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable

import regex

from pipeline.errors import BadRowError
from pipeline.sources.values import kind_of, read_text

#: Ideographs and kana, which are written without spaces: each is a word, as in BERT's basic
#: tokenizer. Else runs of letters with their marks and joiners, digits and underscores; every other
#: sign is a word by itself.
_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}]\p{M}*"
    r"|[[\p{L}\p{M}\p{N}_\u200c\u200d]--[\p{Han}\p{Hiragana}\p{Katakana}]]+"
    r"|\S",
    regex.VERSION1,
)
OUTSIDE = "O"


def read_words(name: str, value: object) -> tuple[str, ...]:
    """A value of a column of words.

    Raises:
        BadRowError: null, no list, empty, or a word that is no text, empty or white space. `name`
            begins the message.
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
    """The characters `[start, end)` of each word: runs of letters and digits, and every other sign by itself.

    Args:
        cuts: places that are between words in any case.

    Ideographs and kana are words one by one. Other scripts without spaces, as Thai, come as whole
    runs: bring such rows as words.
    """
    found: list[tuple[int, int]] = []
    inner = sorted(cuts)
    for match in _WORD.finditer(text):
        bounds = [match.start(), *(cut for cut in inner if match.start() < cut < match.end()), match.end()]
        found += itertools.pairwise(bounds)
    return found


def tags_of(labels: Iterable[str]) -> list[str]:
    """The tags of words that spans with these labels become, in the scheme BIO."""
    return [OUTSIDE, *(f"{prefix}-{label}" for label in labels for prefix in ("B", "I"))]


def tags_of_span(label: str, count: int, names: Collection[str]) -> list[str]:
    """The tags of the words of one span, in the scheme that the model's class names follow: BIOES, BILOU, BIO, IO, or the label alone. Case and surrounding space do not count."""
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
