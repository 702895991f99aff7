"""Read rows with several labels: one per word, spans of a text, or a set of classes."""

from __future__ import annotations

from pipeline.errors import BadRowError, SourceError
from pipeline.records import NO_LABEL
from pipeline.sources.batches import UNREADABLE
from pipeline.sources.inputs.words import OUTSIDE, split_words, tags_of_span
from pipeline.sources.labels import LabelMap, listed
from pipeline.sources.values import kind_of


def word_labels(
    labels: LabelMap, value: object, words: tuple[str, ...], split: str, row: int
) -> tuple[int, ...] | None:
    """Return the class ids of a row's words; None: the row has no labels.

    An unlabelled word (null, -100 or another unlabelled value) has the id -100.

    Raises:
        BadRowError: the value is no list, or does not have one label per word.
        SourceError: a label is not a class.
    """
    if value is None or value is UNREADABLE:
        return None
    if not isinstance(value, list):
        raise BadRowError(f"expected a list, found {kind_of(value)}")
    if len(value) != len(words):
        raise BadRowError(f"expected {len(words)} labels, one a word, found {len(value)}")
    found = [None if each == NO_LABEL else labels.class_id(each, split=split, row=row) for each in value]
    return tuple(NO_LABEL if each is None else each for each in found)


def span_labels(
    labels: LabelMap, value: object, text: str, split: str, row: int
) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
    """Return the words of a text with their class ids; (None, None): the row has no labels.

    A span that begins or ends inside a word divides the word there.

    Raises:
        BadRowError: a span is malformed, exceeds the text, contains no word or overlaps another; or
            the text has no words.
        SourceError: a label is not a class.
    """
    if value is None or value is UNREADABLE:
        return None, None
    spans = sorted(_spans(value, labels, text, split))
    places = split_words(text, [cut for start, end, _ in spans for cut in (start, end)])
    if not places:
        raise BadRowError("the text has no words")
    tags = [OUTSIDE] * len(places)
    reached = 0
    for start, end, label in spans:
        if start < reached:
            raise BadRowError(
                f"the span of characters {start} to {end} ({label}) overlaps the one before it; expected one label a word"
            )
        inside = [i for i, (first, last) in enumerate(places) if start <= first and last <= end]
        if not inside:
            raise BadRowError(f"the span of characters {start} to {end} ({label}) holds no word")
        where = f"{labels.source}: split {split}, row {row}"
        for i, tag in zip(inside, tags_of_span(label, len(inside), labels.names.ids), strict=True):
            tags[i] = tag
            if labels.names.find(tag, where) is None:
                raise SourceError(
                    f"{where}: unknown label {label!r} of a span; expected one of {listed(labels.names.ids)}; rename it in the data, "
                    "or name another column with --label-column"
                )
        reached = end
    found = [labels.class_id(tag, split=split, row=row) for tag in tags]
    return tuple(text[first:last] for first, last in places), tuple(NO_LABEL if i is None else i for i in found)


def flags(labels: LabelMap, value: object, split: str, row: int) -> tuple[int, ...]:
    """Read the classes of a row, as a list of labels or as one boolean or float per class.

    Returns:
        1 or 0 for each class, in order; -100 where it is null or nan, or if the row has no labels.

    Raises:
        BadRowError: a label occurs twice, the number of booleans or floats differs from the number
            of classes, or one is neither 0 nor 1.
        SourceError: a label is not a class.
    """
    count = 1 + max(labels.names.ids.values())  # two classes may have the same name
    if value is None or value is UNREADABLE:
        return (NO_LABEL,) * count
    if not isinstance(value, list):
        raise BadRowError(f"expected a list, found {kind_of(value)}")
    if value and all(each is None or isinstance(each, bool | float) for each in value):
        if len(value) != count:
            raise BadRowError(f"expected {count} numbers, one for each class, found {len(value)}")
        odd = next((each for each in value if each is not None and each == each and each not in (0, 1)), None)
        if odd is not None:
            raise BadRowError(f"expected 0 or 1 for each class, found {odd}")
        return tuple(NO_LABEL if each is None or each != each else int(each) for each in value)
    found = [labels.class_id(each, split=split, row=row) for each in value]
    if len(set(found)) < len(found):
        twice = next(each for i, each in enumerate(value) if each in value[:i])
        raise BadRowError(
            f"label {twice!r} twice; expected the labels that the row has, each once; if the column holds a number for each class, make it booleans or floats"
        )
    return tuple(int(i in found) for i in range(count))


def _spans(value: object, labels: LabelMap, text: str, split: str) -> list[tuple[int, int, str]]:
    """Return (start, end, label) of each span.

    Raises:
        BadRowError: a span is malformed or exceeds the text.
    """
    if not isinstance(value, list):
        raise BadRowError(f"expected a list of spans, found {kind_of(value)}")
    found = []
    for i, span in enumerate(value):
        start, end, label = (span.get(key) if isinstance(span, dict) else None for key in ("start", "end", "label"))
        if not isinstance(start, int) or not isinstance(end, int) or label is None:
            raise BadRowError(f"[{i}]: expected {{start, end, label}}, found {str(span)[:80]}")
        if not 0 <= start < end <= len(text):
            raise BadRowError(f"[{i}]: expected characters within 0 to {len(text)}, found {start} to {end}")
        found.append((start, end, labels.shown(label, split)))
    return found
