"""Sample rows for the HTML page: tokens, words or classes with their largest soft labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.cache.reading.reader import Cache
from pipeline.cache.views.tokens import words_of
from pipeline.records import NO_LABEL, CachedExample, TokenizedExample
from pipeline.softlabels import served_temperature, target
from pipeline.tasks import get_task
from pipeline.tasks.images.pixels import thumbnail

if TYPE_CHECKING:
    from pipeline.records import Target


#: Most characters that are shown of a classifier's text.
CHARACTERS = 1500


@dataclass(frozen=True, slots=True)
class Candidate:
    """A class with its soft label."""

    name: str
    weight: float
    is_next: bool
    """Whether this is the hard label."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token or word of a sample row, with the teacher's predictions at its place."""

    text: str
    candidates: tuple[Candidate, ...] = ()
    weight: float | None = None
    """The target weight of the token, or of the word's label; None: there is no soft label, or no
    hard label."""
    kept: int = 0
    entropy: float | None = None
    rest: float = 0.0
    """The mass of the classes that are not shown."""
    label: str | None = None
    """The class of a word; None: it has no label, or this is a token."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One row as it is shown."""

    title: str
    facts: str
    tokens: tuple[Token, ...] = ()
    words: tuple[Token, ...] = ()
    cut: int = 0
    """Number of tokens, words, or characters of the text that are left out."""
    text: str = ""
    candidates: tuple[Candidate, ...] = ()
    """Classifiers: the classes of the row."""
    image: str = ""
    """A `data:` URI of the row's thumbnail."""


def sample_of(cache: Cache, row: CachedExample, *, tokens: int, top: int) -> Sample:
    """Return one row as a sample.

    Args:
        tokens: most tokens or words to show.
        top: most soft labels to show at each position.
    """
    part = "piece" if row.example.view is None else "view"
    title = f"Source row {row.example.source_row}" + (f", {part} {row.example.piece}" if row.example.piece else "")
    goal = target(row.soft, served_temperature(row.soft.encoding))
    if get_task(cache.manifest.contract.task).names == "places":
        return _place_sample(cache, row, goal, title, top)
    if row.example.labels is not None and row.example.supervised is None:
        return _label_sample(cache, row, title, top)
    if row.example.labels is not None and cache.manifest.contract.label_names is not None:
        return _word_sample(cache, row, goal, title, tokens, top)
    if row.example.supervised is not None:
        return _token_sample(cache, row, goal, title, tokens, top)
    names = cache.manifest.contract.label_names or ()
    label, text = row.example.label, text_of(cache, row)
    image = row.example.image
    return Sample(
        title,
        "no label" if label is None else f"label {names[label]}",
        text=text[:CHARACTERS],
        cut=max(0, len(text) - CHARACTERS),
        candidates=tuple(Candidate(names[i], weight, i == label) for i, weight in _heaviest(goal, 0, top)),
        image="" if image is None else thumbnail(image.data, row.example.view),
    )


def _place_sample(cache: Cache, row: CachedExample, goal: Target, title: str, top: int) -> Sample:
    """Return a question and its text, with the likeliest first and last tokens of the answer."""
    text, labels = text_of(cache, row), row.example.labels
    assert labels is not None
    shown = tuple(
        Candidate(f"{name}: {place_name(cache, row, i)}", weight, i == int(labels[n]))
        for n, name in enumerate(cache.manifest.contract.label_names or ())
        for i, weight in _heaviest(goal, n, max(1, top // 2))
    )
    answer = "no label" if int(labels[0]) == NO_LABEL else f"answer {answer_text(cache, row, *labels.tolist())!r}"
    return Sample(title, answer, text=text[:CHARACTERS], cut=max(0, len(text) - CHARACTERS), candidates=shown)


def place_name(cache: Cache, row: CachedExample, place: int) -> str:
    """Return the token at a place of a row, and the number of the place."""
    ids = row.example.input_ids
    return f"{cache.tokenizer.decode([int(ids[place])])!s} ({place})" if place < len(ids) else f"({place})"


def answer_text(cache: Cache, row: CachedExample, first: int, last: int) -> str:
    """Return the tokens from one place of a row to another, as text."""
    return str(cache.tokenizer.decode(row.example.input_ids[first : last + 1].tolist())).strip()


def _label_sample(cache: Cache, row: CachedExample, title: str, top: int) -> Sample:
    """Return a text that has several labels, with the likeliest labels and their probabilities."""
    names, labels, text = cache.manifest.contract.label_names or (), row.example.labels, text_of(cache, row)
    assert labels is not None
    has = [name for name, label in zip(names, labels.tolist(), strict=True) if label == 1]
    known = bool((labels != NO_LABEL).any())
    shares = share_of_yes(row)
    best = np.argsort(-shares, kind="stable")[:top].tolist()
    return Sample(
        title,
        f"labels {', '.join(has) or 'none'}" if known else "labels not known",
        text=text[:CHARACTERS],
        cut=max(0, len(text) - CHARACTERS),
        candidates=tuple(Candidate(names[i], float(shares[i]), int(labels[i]) == 1) for i in best),
    )


def share_of_yes(row: CachedExample) -> np.ndarray:
    """Return (N,) float64: the probability of each label of a row with several labels."""
    goal = target(row.soft, served_temperature(row.soft.encoding))
    owner = np.repeat(np.arange(len(goal)), goal.offsets.diff().numpy())
    yes = goal.ids.numpy() == 1
    return np.bincount(owner[yes], weights=goal.weights.double().numpy()[yes], minlength=len(goal))


def text_of(cache: Cache, row: CachedExample) -> str:
    """Return the text of a row, with its second text or its choices if it has them.

    Without stored texts it is decoded from the tokens. For an image it is `image_text`.
    """
    if row.example.image is not None:
        return image_text(row.example)
    text, pair = row.example.text, row.example.text_pair
    if text is None:
        return str(cache.tokenizer.decode(row.example.input_ids.tolist()))
    choices = [f"{i}. {each}" for i, each in enumerate(row.example.choices or (), 1)]
    return "\n".join([text, *([] if pair is None else [pair]), *choices])


def image_text(example: TokenizedExample) -> str:
    """Return the file name of an image, its size in bytes, and the part that is used."""
    assert example.image is not None
    text = f"{example.image.path or 'an image'}, {len(example.image.data):,} bytes"
    if example.view is None or not len(example.view):
        return text
    left, top, width, height, mirrored = example.view.tolist()
    return f"{text}, {width} x {height} pixels at {left}, {top}{', mirrored' if mirrored else ''}"


def _token_sample(cache: Cache, row: CachedExample, goal: Target, title: str, tokens: int, top: int) -> Sample:
    assert row.example.supervised is not None
    ids = row.example.input_ids.tolist()
    hidden = row.example.labels  # None: a position predicts the token after it
    shift = 1 if hidden is None else 0
    made_at = {int(position) + shift: n for n, position in enumerate(np.flatnonzero(row.example.supervised))}
    texts: dict[int, str] = {}

    def decode(token: int) -> str:
        if token not in texts:
            texts[token] = str(cache.tokenizer.decode([token]))
        return texts[token]

    shown = []
    for place, shown_token in enumerate(ids[:tokens]):
        n = made_at.get(place)
        if n is None:
            shown.append(Token(decode(shown_token)))
            continue
        token = shown_token if hidden is None else int(hidden[n])
        part = slice(int(goal.offsets[n]), int(goal.offsets[n + 1]))
        hit = goal.weights[part].numpy()[goal.ids[part].numpy() == token]
        best = _heaviest(goal, n, top)
        shown.append(
            Token(
                decode(token),
                candidates=tuple(Candidate(decode(i), weight, i == token) for i, weight in best),
                weight=float(hit[0]) if len(hit) else 0.0,
                kept=part.stop - part.start,
                entropy=None if row.entropy is None else float(row.entropy[n]),
                rest=max(0.0, 1.0 - sum(weight for _, weight in best)),
            )
        )
    count = max(len(row.soft), 1)
    facts = f"{len(ids):,} tokens, {len(row.soft):,} with soft labels; teacher's loss {row.teacher_nll_sum / count:.2f} nats a token"
    return Sample(title, facts, tokens=tuple(shown), cut=max(0, len(ids) - tokens))


def _word_sample(cache: Cache, row: CachedExample, goal: Target, title: str, words: int, top: int) -> Sample:
    names, labels = cache.manifest.contract.label_names or (), row.example.labels
    assert labels is not None
    found = words_of(cache.tokenizer, row.example)
    shown = []
    for n, (word, label) in enumerate(zip(found[:words], labels.tolist(), strict=False)):
        part = slice(int(goal.offsets[n]), int(goal.offsets[n + 1]))
        hit = goal.weights[part].numpy()[goal.ids[part].numpy() == label]
        best = _heaviest(goal, n, top)
        known = label != NO_LABEL
        shown.append(
            Token(
                word,
                candidates=tuple(Candidate(names[i], weight, i == label) for i, weight in best),
                weight=(float(hit[0]) if len(hit) else 0.0) if known else None,
                kept=part.stop - part.start,
                entropy=None if row.entropy is None else float(row.entropy[n]),
                rest=max(0.0, 1.0 - sum(weight for _, weight in best)),
                label=names[label] if known else None,
            )
        )
    known_labels = int((labels != NO_LABEL).sum())
    facts = f"{row.example.num_tokens:,} tokens, {len(found):,} words, {known_labels:,} of them labelled"
    if known_labels:
        facts += f"; teacher's loss {row.teacher_nll_sum / known_labels:.2f} nats a labelled word"
    return Sample(title, facts, words=tuple(shown), cut=max(0, len(found) - words))


def _heaviest(goal: Target, n: int, top: int) -> list[tuple[int, float]]:
    """Return the `top` largest weights of a position; ties are broken by order."""
    part = slice(int(goal.offsets[n]), int(goal.offsets[n + 1]))
    ids, weights = goal.ids[part].numpy(), goal.weights[part].numpy()
    if 0 < top < len(weights):  # sorting a whole vocabulary is slow
        large = weights >= np.partition(weights, -top)[-top]
        ids, weights = ids[large], weights[large]
    order = np.argsort(-weights, kind="stable")[:top]
    return list(zip(ids[order].tolist(), weights[order].tolist(), strict=True))
