"""Warnings about likely mistakes in a data set, one line each, for the file and the screen."""

from __future__ import annotations

from collections.abc import Iterator
from shlex import quote

from pipeline.sources.labels import fold, is_number, sides
from pipeline.starter.records import Start
from pipeline.starter.roles import is_long


def text_cautions(start: Start) -> Iterator[str]:
    """Warn about columns of text that are not read."""
    if start.generative or start.roles.text_pair is not None:
        return
    for each in start.others:
        if is_long(each):
            yield (
                f"column {each.name!r} also holds text, which is not read; "
                f"--text-pair-column {quote(each.name)} reads both."
            )


def label_cautions(start: Start) -> Iterator[str]:
    """Warn about rare classes, rows with the label -1, and classes with nearly equal names."""
    if start.roles.label is None:
        return
    if start.counts.rare:
        yield _rare(start.counts.rare)
    renamed = {sides(item)[0].strip() for item in start.data.label_map}
    unlabelled = sum(number for value, number in start.facts[start.roles.label].values if value == -1)
    if unlabelled and "-1" not in renamed and "-1" not in start.counts.classes:
        yield f"-1 on {unlabelled:,} rows means: no label. To make it a class: --label-map=-1=NAME."
    groups: dict[str, list[str]] = {}
    for name in start.counts.classes:
        groups.setdefault(fold(name), []).append(name)
    for names in groups.values():
        if len(names) > 1:
            yield _alike(sorted(names, key=lambda name: -start.counts.classes[name]), start.is_teacher)


def is_range(start: Start) -> bool:
    """Whether classes are the numbers from 0 to the largest label."""
    label = start.roles.label
    return (
        label is not None
        and not start.is_teacher
        and start.facts[label].kind in ("integers", "floats")
        and all(is_number(name) for name in start.counts.classes)
    )


def _rare(rare: tuple[str, ...]) -> str:
    more = f" and {len(rare) - 8} more" if len(rare) > 8 else ""
    return (
        f"fewer than 5 labelled rows in train: {', '.join(rare[:8])}{more}; "
        "label more of them, or join classes with label_map."
    )


def _alike(names: list[str], is_teacher: bool) -> str:
    """Warn about classes whose names differ in case or outer spaces only, most frequent first."""
    said = f"{' and '.join(map(repr, names))} differ in case or outer spaces alone and are separate classes"
    if is_teacher:
        return said + " of the teacher."
    flags = " ".join(f"--label-map {quote(f'{name}={names[0]}')}" for name in names[1:])
    return f"{said}; to join them: {flags}."
