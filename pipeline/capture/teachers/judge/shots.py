"""Examples in a prompt: labelled rows of the training split."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import MisuseError
from pipeline.records import Example
from pipeline.softlabels import counter_uniforms
from pipeline.sources import LabelMap, Source, read_examples
from pipeline.sources.batches import read_rows

logger = logging.getLogger(__name__)

#: The only split that examples come from; other splits are for evaluation.
_SPLIT = "train"
#: For sources that are read by row group.
_MOST_ROW_GROUPS = 16


@dataclass(frozen=True, slots=True)
class Shot:
    """A labelled row that is shown as an example."""

    row: int
    text: str
    """The whole text of the row, which identifies it."""
    text_pair: str | None
    label: int
    shown: str = ""
    """The beginning of the text, as the prompt shows it."""
    shown_pair: str | None = None

    @property
    def place(self) -> str:
        """Split and row number, as in the contract."""
        return f"{_SPLIT}:{self.row}"

    def is_row(self, text: str, text_pair: str | None) -> bool:
        """Whether a row has the same texts: it is this row or a duplicate."""
        return self.text.strip() == text.strip() and (self.text_pair or "").strip() == (text_pair or "").strip()


@dataclass(frozen=True, slots=True)
class Shots:
    """The examples of a prompt, and spare ones.

    A spare example replaces an example of its label in the prompt of a row that is that example
    itself.
    """

    chosen: tuple[Shot, ...]
    reserve: tuple[Shot, ...]

    def of(self, text: str, text_pair: str | None) -> tuple[Shot, ...]:
        """Return the examples for a row, without the row itself."""
        if not any(shot.is_row(text, text_pair) for shot in self.chosen):
            return self.chosen
        spare = {shot.label: shot for shot in self.reserve if not shot.is_row(text, text_pair)}
        found = (spare.get(shot.label) if shot.is_row(text, text_pair) else shot for shot in self.chosen)
        return tuple(shot for shot in found if shot is not None)


def choose_shots(
    source: Source, labels: LabelMap, names: Sequence[str], count: int, seed: int, begun: Sequence[str] = ()
) -> Shots:
    """Choose `count` labelled rows of `train`, taking each label in turn.

    The order of the rows of a label is a hash of seed and row number.

    Args:
        begun: the places of the examples of an existing cache, which are kept even if rows were
            appended since.

    Raises:
        MisuseError: `train` has fewer labelled rows.
        SourceError: a label is not a class.
    """
    if not count:
        return Shots((), ())
    queues: dict[int, list[Shot]] = defaultdict(list)
    each = -(-count // len(names)) + 1
    texts: set[tuple[str, str]] = set()
    spare: list[Shot] = []
    for row, label in _labelled(source, labels, seed):
        if len(queues[label]) >= each and len(spare) >= count:
            continue
        shot = _read(source, labels, row)
        if shot is None or (key := (shot.text.strip(), (shot.text_pair or "").strip())) in texts:
            continue
        texts.add(key)
        (queues[label] if len(queues[label]) < each else spare).append(shot)
    chosen: list[Shot] = []
    for turn in range(each):
        chosen += [queue[turn] for _, queue in sorted(queues.items()) if turn < len(queue)]
    chosen = [*chosen, *spare]
    if len(chosen) < count:
        raise MisuseError(
            f"--shots {count}: {source.name}: split {_SPLIT} has {len(chosen):,} labelled rows with a text; ask for fewer, or leave --shots out"
        )
    without = [name for i, name in enumerate(names) if not queues[i]]
    if without:
        logger.warning(
            "%s: no labelled row of %s has the label %s: the prompt has no example of it",
            *(source.name, _SPLIT, ", ".join(map(repr, without[:5]))),
        )
    if begun and [shot.place for shot in chosen[:count]] != list(begun) and len(begun) == count:
        kept = [shot for shot in (_at(source, labels, place) for place in begun) if shot is not None]
        chosen = [*kept, *(shot for shot in chosen if shot.place not in begun)] if len(kept) == count else chosen
    return Shots(tuple(chosen[:count]), tuple(chosen[count:]))


def _labelled(source: Source, labels: LabelMap, seed: int) -> Iterator[tuple[int, int]]:
    """Yield (row, label) of the labelled rows, in the order of their hashes."""
    column = source.columns.label
    dataset = source.splits.get(_SPLIT)
    if dataset is None or column is None or column not in dataset.column_names:
        raise MisuseError(
            f"--shots: {source.name}: no labelled rows in a split {_SPLIT}, found {', '.join(source.splits)}; examples never come from another split, leave --shots out"
        )
    found: list[tuple[int, int]] = []
    for near in source.sample_ranges(_SPLIT, 0, len(dataset), _MOST_ROW_GROUPS):
        for row, item in enumerate(read_rows(dataset, [column], near.start, near.stop), start=near.start):
            label = labels.class_id(item[column], split=_SPLIT, row=row)
            if label is not None:
                found.append((row, label))
    keys = counter_uniforms(seed, _SPLIT, 0, 0, np.array([row for row, _ in found], dtype=np.int64)).tolist()
    yield from (pair for _, pair in sorted(zip(keys, found, strict=True)))


def _at(source: Source, labels: LabelMap, place: str) -> Shot | None:
    """Return the example at a place of a contract, or None if it no longer exists."""
    split, _, row = place.partition(":")
    rows = len(source.splits[_SPLIT])
    return _read(source, labels, int(row)) if split == _SPLIT and row.isdecimal() and int(row) < rows else None


def _read(source: Source, labels: LabelMap, row: int) -> Shot | None:
    """Read an example; None if the row has no text."""
    item = next(iter(read_examples(source, _SPLIT, row, row + 1, labels)))
    if not isinstance(item, Example) or item.label is None or not (item.text or "").strip():
        return None
    return Shot(row, item.text or "", item.text_pair, item.label)
