"""`rounds: N` of a YAML file: sections that run once per round.

A section with the placeholder `{round}` (1 to N) or `{previous}` (one less) in any of its texts
runs once per round, with the placeholder replaced by the number. The sections of a round run in the
order of `STAGES`. Sections without a placeholder run before the first round, except `evaluate` and
`report`, which run after the last.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.file import ConfigFile
from pipeline.config.sections import STAGES
from pipeline.errors import ConfigError

#: Stages that run after the last round if they have no placeholder.
_LAST = ("evaluate", "report")
_ROUND, _PREVIOUS = "{round}", "{previous}"
#: A word in single braces.
_BRACES = re.compile(r"(?<!\{)\{\s*([A-Za-z_]+)[^{}]*\}(?!\})")
#: Keys whose texts may contain other braces.
_FREE_TEXTS = ("template", "prompt_template", "chat_template_kwargs", "label_text", "stop", "prompt")


@dataclass(frozen=True, slots=True)
class Step:
    """One section of one stage, with placeholders filled in."""

    stage: str
    section: Mapping[str, Any]
    round: int | None = None
    """Number of the round, from 1; None: outside the rounds."""
    section_number: int = 0
    """Index of the section within its stage, from 0."""


def steps_of(file: ConfigFile) -> tuple[Step, ...]:
    """All steps of a file, in execution order.

    Raises:
        ConfigError: a placeholder is used without `rounds`, `rounds` without a placeholder, or two
            steps have the same output.
    """
    each = [
        Step(stage, section, section_number=number)
        for stage in STAGES
        for number, section in enumerate(file.sections.get(stage, ()))
    ]
    plain = [step for step in each if placeholder_in(step.section) is None]
    repeated = [step for step in each if placeholder_in(step.section) is not None]
    _check_placeholders(file, [(step.stage, step.section) for step in repeated])
    _check_spelling(file)
    rounds = [
        Step(step.stage, _filled(step.section, number), number, step.section_number)
        for number in range(1, (file.rounds or 0) + 1)
        for step in repeated
    ]
    if file.rounds is None:
        return tuple(plain)
    before = [step for step in plain if step.stage not in _LAST]
    after = [step for step in plain if step.stage in _LAST]
    steps = (*before, *rounds, *after)
    _check_outputs(file, steps)
    return steps


def through_stage(steps: tuple[Step, ...], stage: str) -> tuple[Step, ...]:
    """The steps up to the last one of a stage; without rounds, none of a later stage."""
    last = max((number for number, step in enumerate(steps) if step.stage == stage), default=-1)
    return steps[: last + 1]


def sections_for(file: ConfigFile, command: str) -> tuple[Mapping[str, Any], ...]:
    """The sections of a command that is called directly, not by `run`.

    Raises:
        ConfigError: a section has a placeholder; only `run` runs rounds.
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
    """The key and the text of the first placeholder in a section; None: no placeholder."""
    for name, text in _texts(section, key):
        if _ROUND in text or _PREVIOUS in text:
            return name, text
    return None


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield every text in a section with its key."""
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
            f"{file.path}: {stage}: {key}: {text!r} is a placeholder for the number of a round, but the file has no "
            "rounds; add rounds: N at the top"
        )
    if file.rounds is not None and not repeated:
        raise ConfigError(
            f"{file.path}: rounds: {file.rounds}, and no section of a stage is run once a round; put {_ROUND} into the paths "
            "that each round has for itself, or leave rounds out"
        )


def _check_spelling(file: ConfigFile) -> None:
    """Check for misspelt placeholders, which would become names of directories."""
    if file.rounds is None:
        return
    for stage in STAGES:
        for section in file.sections.get(stage, ()):
            for key, text in _texts(section, ""):
                if key.rpartition(".")[2] in _FREE_TEXTS:
                    continue
                for found in _BRACES.finditer(text):
                    near = difflib.get_close_matches(found[1].lower(), ["round", "previous"], n=1)
                    if near and found[0] not in (_ROUND, _PREVIOUS):
                        raise ConfigError(
                            f"{file.path}: {stage}: {key}: {text!r}: {found[0]} is no placeholder; did you mean {{{near[0]}}}? "
                            f"{_ROUND} and {_PREVIOUS} alone are"
                        )


def _check_outputs(file: ConfigFile, steps: tuple[Step, ...]) -> None:
    """Check that no two steps have the same output; the second would replace it or fail."""
    seen: dict[tuple[str, str], Step] = {}
    for step in steps:
        output = step.section.get("output")
        if not isinstance(output, str):
            continue
        kind = step.stage if step.stage in _LAST else "made"  # an evaluation may share the directory of a model
        place = (kind, output if "://" in output else os.path.abspath(Path(output).expanduser()))
        first = seen.setdefault(place, step)
        if first.stage != step.stage:
            raise ConfigError(
                f"{file.path}: {step.stage}: output: {output} is written by {first.stage} too; name another"
            )
        if first is not step:
            raise ConfigError(
                f"{file.path}: {step.stage}: output: {output} is written {_when(first)} and {_when(step)}; put {_ROUND} "
                "into it, or name another"
            )


def _when(step: Step) -> str:
    return "outside the rounds" if step.round is None else f"in round {step.round}"
