"""Fidelity: agreement, divergences, slices, and the largest differences from the teacher."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc

from pipeline.cache import Cache
from pipeline.cache.views.samples import image_text, place_name
from pipeline.cache.views.tokens import in_context, words_of
from pipeline.cache.views.units import classes_of
from pipeline.evaluation.measures.observation import Observation, position_kl_is_known
from pipeline.evaluation.measures.scores import Scores
from pipeline.evaluation.measures.subjects import Subject
from pipeline.evaluation.records import Closeness, Example, Slice, SliceLine
from pipeline.records import CachedExample
from pipeline.tasks import Task, get_task

#: Maximum number of slices; the most frequent classes are shown.
_MOST_SLICES = 20
_TEXT = 400
_BANDS = (1, 10, 100, 1000)


def closeness(subject: Subject, scores: Scores) -> Closeness:
    """How closely a model matches its teacher; shares on right and wrong answers are seed means."""
    teacher = subject.teacher.seen
    wrong = teacher.labelled & ~teacher.right
    return Closeness(
        name=subject.name,
        role=subject.model.role,
        agreement=scores.measured(subject.name, "agreement"),
        on_right=_over_seeds(subject.seen, "agrees", teacher.right),
        on_errors=_over_seeds(subject.seen, "agrees", wrong),
        mended=float("nan") if subject.has_own_tokens else _over_seeds(subject.seen, "right", wrong),
        kl=scores.measured(subject.name, "kl") if scores.has(subject.name, "kl") else None,
        js=scores.measured(subject.name, "js") if scores.has(subject.name, "js") else None,
    )


def _over_seeds(seen: Sequence[Observation], what: str, where: np.ndarray) -> float:
    """The mean over seeds of a column at the teacher's positions in `where`, (T,) bool."""
    found = [(getattr(one, what), one.at(where)) for one in seen]
    return float(np.mean([values[at].mean() for values, at in found])) if all(at.any() for _, at in found) else math.nan


def slices(
    task: Task, subjects: Sequence[Subject], cache: Cache, teacher: Observation
) -> tuple[str, tuple[Slice, ...]]:
    """The kind of slices, and every model on each slice.

    Slices are the classes by label, or tokens by their frequency in the training split.
    """
    labels = teacher.predictions.labels
    if teacher.is_score:
        return "", ()
    if task.predicts_tokens:
        kind, names, members = _token_bands(task, cache, labels)
    elif task.names == "positions":
        kind, names = "label", list(cache.manifest.contract.label_names or ())
        place = np.arange(len(labels)) % len(names)
        common = np.argsort(-np.bincount(place[labels == 1], minlength=len(names)), kind="stable")[:_MOST_SLICES]
        members = [teacher.labelled & (place == i) for i in sorted(common.tolist())]
        names = [names[i] for i in sorted(common.tolist())]
    else:
        kind = "class"
        classes, counts = np.unique(labels[teacher.labelled], return_counts=True)
        kept = classes[np.argsort(-counts, kind="stable")][:_MOST_SLICES]
        names = [class_name(cache, int(c)) for c in sorted(kept)]
        members = [labels == c for c in sorted(kept)]
    found = []
    for name, where in zip(names, members, strict=True):
        if where.any():
            lines = tuple(_slice_line(subject, where) for subject in subjects)
            found.append(Slice(name, int(where.sum()), float(teacher.right[where].mean()), lines))
    return kind, tuple(found)


def _slice_line(subject: Subject, where: np.ndarray) -> SliceLine:
    """One model on one slice, with `where` over the teacher's positions.

    For a model with another tokenizer: aligned positions only, and no accuracy and loss.
    """
    known, own = position_kl_is_known(subject.teacher.cache.manifest.contract), subject.has_own_tokens
    return SliceLine(
        name=subject.name,
        accuracy=None if own else _over_seeds(subject.seen, "right", where),
        loss=None if own else float(np.mean([one.predictions.nll[where].mean() for one in subject.seen])),
        agreement=_over_seeds(subject.seen, "agrees", where),
        kl=_over_seeds(subject.seen, "kl", where) if known else None,
    )


def _token_bands(task: Task, cache: Cache, labels: np.ndarray) -> tuple[str, list[str], list[np.ndarray]]:
    split = "train" if "train" in cache.splits else cache.splits[0]
    times = token_counts(cache, split)[np.maximum(labels, 0)]
    edges = [0, *_BANDS, np.inf]
    names = ["unseen", "1 to 9 times", "10 to 99 times", "100 to 999 times", "1,000 times or more"]
    bands = [(labels >= 0) & (times >= low) & (times < high) for low, high in itertools.pairwise(edges)]
    kind = {"hidden": "hidden", "target": "target"}.get(task.label_source, "next")
    return f"{kind} token, by how often it stands in the split {split}", names, bands


def token_counts(cache: Cache, split: str) -> np.ndarray:
    """(V,) int64: the number of occurrences of each token in a split.

    Reads the token ids one row group at a time.
    """
    counts = np.zeros(cache.manifest.contract.num_classes, dtype=np.int64)
    dataset = cache.dataset(split)
    for table in dataset.tables(["input_ids"]):
        ids = pc.list_flatten(table.column(0))
        counts += np.bincount(ids.to_numpy(), minlength=len(counts))[: len(counts)]
    return counts


def class_name(cache: Cache, number: int) -> str:
    """The name of a label, or the quoted text of a token; '' for no label."""
    names = classes_of(cache.manifest.contract)
    if number < 0:
        return ""
    return names[number] if names is not None else repr(str(cache.tokenizer.decode([number])))


def _said(cache: Cache, row: CachedExample, value: np.generic) -> str:
    """The name of a class, the token at a place of the row, or a score; '' for none."""
    if value.dtype.kind != "f":
        is_place = get_task(cache.manifest.contract.task).names == "places" and int(value) >= 0
        return place_name(cache, row, int(value)) if is_place else class_name(cache, int(value))
    return "" if np.isnan(value) else f"{float(value):.3f}"


def examples(task: Task, subject: Subject, split: str, count: int) -> tuple[Example, ...]:
    """The positions at which the first seed of a student differs most from its teacher.

    Difference is KL, or log(q / p) of the teacher's most likely class if KL is not known per
    position, with the teacher's probability q and the student's p.
    """
    if not count:
        return ()
    seen, teacher, cache = subject.seen[0], subject.teacher.seen, subject.cache
    is_kl = position_kl_is_known(cache.manifest.contract)
    aligned = np.arange(len(seen.surprise)) if seen.teacher_position is None else seen.teacher_position
    if is_kl:
        distance = seen.kl
    else:
        confidence = teacher.predictions.confidence[np.maximum(aligned, 0)]
        distance = seen.surprise + np.log(np.where(confidence > 0, confidence, 1.0))  # > 0 is False for nan
    worst = np.argsort(-distance, kind="stable")[:count]
    starts = np.concatenate([[0], np.cumsum(np.bincount(seen.predictions.rows, minlength=seen.num_rows))])
    dataset = cache.dataset(split)
    found = []
    for position in worst.tolist():
        number = int(seen.predictions.rows[position])
        row = dataset[number]
        theirs = int(aligned[position])
        if theirs < 0:  # no difference to show
            continue
        believed = teacher.predictions.confidence[theirs]
        choice = _said(subject.teacher.cache, row, teacher.predictions.predicted[theirs])
        answer = _said(cache, row, seen.predictions.predicted[position])
        sure = seen.predictions.confidence[position]
        found.append(
            Example(
                student=subject.name,
                source_row=row.example.source_row,
                text=_text(task, cache, row, position - int(starts[number])),
                truth=_said(cache, row, seen.predictions.labels[position]),
                teacher=choice if np.isnan(believed) else f"{choice} ({believed:.0%})",
                answer=answer if np.isnan(sure) else f"{answer} ({sure:.0%})",
                distance=float(distance[position]),
                is_kl=is_kl,
            )
        )
    return tuple(found)


def _text(task: Task, cache: Cache, row: CachedExample, position: int) -> str | None:
    """The text of a row, or the context of a word or token at a position.

    None if the cache was made without texts.
    """
    if not cache.manifest.contract.store_text:
        return None
    if row.example.image is not None:
        return image_text(row.example)
    if not task.marks_positions:
        choices = [f"{i}. {each}" for i, each in enumerate(row.example.choices or (), 1)]
        pair = [text for text in (row.example.text, row.example.text_pair, *choices) if text is not None]
        by_position = task.names in ("positions", "places")
        label = f"{(cache.manifest.contract.label_names or ())[position]}: " if by_position else ""
        return label + _short(" | ".join(pair)) if pair else None
    if row.example.labels is not None and cache.manifest.contract.label_names is not None:
        return _short(in_context(words_of(cache.tokenizer, row.example), position))
    assert row.example.supervised is not None
    end = int(np.flatnonzero(row.example.supervised)[position]) + 1
    if task.label_source == "target":
        where, ids = row.example.supervised, row.example.input_ids
        source, before = (
            str(cache.tokenizer.decode(each, skip_special_tokens=True))
            for each in (ids[~where].tolist(), ids[where][:position].tolist())
        )
        return f"{_short(source)} -> {_short(before)} ..."
    if row.example.labels is not None:  # a hidden token has context on both sides
        around = row.example.input_ids[max(0, end - 20) : end + 20].tolist()
        return f"... {_short(str(cache.tokenizer.decode(around)))} ..."
    before = str(cache.tokenizer.decode(row.example.input_ids[max(0, end - 40) : end].tolist()))
    return f"... {_short(before)}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _TEXT else text[: _TEXT - 3] + "..."
