"""`rounds: N` of a YAML file: sections that are run once a round.

A section that holds `{round}` (1 to N) or `{previous}` (one less) in any of its texts is run once a
round, with the numbers put in. The sections of one round follow each other in the order of `STAGES`.
Those without a placeholder are run before the first round, but `evaluate` and `report` after the last.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.file import ConfigFile
from pipeline.config.sections import STAGES
from pipeline.errors import ConfigError

#: Stages that are run after the last round where they have no placeholder.
_LAST = ("evaluate", "report")
_ROUND, _PREVIOUS = "{round}", "{previous}"


@dataclass(frozen=True, slots=True)
class Step:
    """One section of one stage, as it is to be run."""

    stage: str
    section: Mapping[str, Any]
    round: int | None = None
    """From 1; None: outside the rounds."""


def steps_of(file: ConfigFile) -> tuple[Step, ...]:
    """All steps of a file, in the order in which they are run.

    Raises:
        ConfigError: a placeholder without `rounds`, `rounds` without a placeholder, or two steps with one output.
    """
    plain = [
        Step(stage, section)
        for stage in STAGES
        for section in file.sections.get(stage, ())
        if placeholder_in(section) is None
    ]
    repeated = [
        (stage, section)
        for stage in STAGES
        for section in file.sections.get(stage, ())
        if placeholder_in(section) is not None
    ]
    _check_placeholders(file, repeated)
    rounds = [
        Step(stage, _filled(section, number), number)
        for number in range(1, (file.rounds or 0) + 1)
        for stage, section in repeated
    ]
    if file.rounds is None:
        return tuple(plain)
    before = [step for step in plain if step.stage not in _LAST]
    after = [step for step in plain if step.stage in _LAST]
    steps = (*before, *rounds, *after)
    _check_outputs(file, steps)
    return steps


def through_stage(steps: tuple[Step, ...], stage: str) -> tuple[Step, ...]:
    """The steps up to the last one of a stage; without rounds, no later stage is among them."""
    last = max((number for number, step in enumerate(steps) if step.stage == stage), default=-1)
    return steps[: last + 1]


def sections_for(file: ConfigFile, command: str) -> tuple[Mapping[str, Any], ...]:
    """The sections of one command that is not called by `run`.

    Raises:
        ConfigError: one is run once a round, which `run` alone does.
    """
    sections = file.sections.get(command, ())
    for section in sections:
        if (found := placeholder_in(section)) is not None:
            raise ConfigError(
                f"{file.path}: {command}: {found[0]}: {found[1]!r} stands for the number of a round, which softlabel run "
                f"puts in; softlabel run {file.path}" + (f" {command}" if command in STAGES else "")
            )
    return sections


def placeholder_in(section: Any, key: str = "") -> tuple[str, str] | None:
    """The key and the text of the first placeholder in a section; None: it has none."""
    for name, text in _texts(section, key):
        if _ROUND in text or _PREVIOUS in text:
            return name, text
    return None


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text in a section, with the key that it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, key)


def _filled(value: Any, number: int) -> Any:
    if isinstance(value, str):
        return value.replace(_ROUND, str(number)).replace(_PREVIOUS, str(number - 1))
    if isinstance(value, Mapping):
        return {name: _filled(item, number) for name, item in value.items()}
    return [_filled(item, number) for item in value] if isinstance(value, list | tuple) else value


def _check_placeholders(file: ConfigFile, repeated: list[tuple[str, Mapping[str, Any]]]) -> None:
    found = placeholder_in(file.shared)
    if found is not None:
        raise ConfigError(
            f"{file.path}: {found[0]}: {found[1]!r} is shared by all sections, and not all are run once a round; give it in "
            "the data: of a section"
        )
    if file.rounds is None and repeated:
        stage, section = repeated[0]
        key, text = placeholder_in(section) or ("", "")
        raise ConfigError(
            f"{file.path}: {stage}: {key}: {text!r} stands for the number of a round, and the file says nothing of "
            "rounds; add rounds: N at the top"
        )
    if file.rounds is not None and not repeated:
        raise ConfigError(
            f"{file.path}: rounds: {file.rounds}, and no section of a stage is run once a round; put {_ROUND} into the paths "
            "that each round has for itself, or leave rounds out"
        )


def _check_outputs(file: ConfigFile, steps: tuple[Step, ...]) -> None:
    """Refuse two steps of one stage that write to one place: the second would replace the first."""
    seen: dict[tuple[str, str], Step] = {}
    for step in steps:
        output = step.section.get("output")
        if not isinstance(output, str):
            continue
        place = (step.stage, output if "://" in output else os.path.normpath(Path(output).expanduser()))
        first = seen.setdefault(place, step)
        if first is not step:
            raise ConfigError(
                f"{file.path}: {step.stage}: output: {output} is written {_when(first)} and {_when(step)}; put {_ROUND} "
                "into it, or name another"
            )


def _when(step: Step) -> str:
    return "outside the rounds" if step.round is None else f"in round {step.round}"
