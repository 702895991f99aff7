"""Checks of a file's steps as a whole, before the first one runs."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.cache.storage.urls import is_url
from pipeline.config import CacheLogitsConfig, ConfigFile, GenerateConfig, Step, TrainStudentConfig
from pipeline.config.options import name_and_path
from pipeline.errors import ConfigError, ContractError, PipelineError
from pipeline.records import Encoding, Loss, Score
from pipeline.softlabels.names import encoding_text
from pipeline.tasks import get_task

logger = logging.getLogger(__name__)

#: Settings that name inputs of a stage.
INPUTS = (
    "dataset",
    "model",
    "teacher",
    "cache",
    "student",
    "control",
    "chat_template",
    "template",
    "prompt_template",
    "unlabelled",
    "tokenizer",
)

#: A step with its section, as the configuration of its command.
Resolved = tuple[Step, Any]


def place_of(path: str) -> str:
    """Normalize a path or URL for comparison."""
    return path if is_url(path) else os.path.abspath(path)


def named_inputs(config: Any) -> set[str]:
    """Paths that a stage reads, as written in its configuration."""
    settings = dataclasses.asdict(config)
    found = [value for name, value in {**settings, **settings.get("data", {})}.items() if name in INPUTS and value]
    names = itertools.chain.from_iterable(value if isinstance(value, tuple) else [value] for value in found)
    return {os.path.normpath(name_and_path(name)[1]) for name in names}


def check_steps(file: ConfigFile, steps: Sequence[Resolved]) -> None:
    """Check that all steps can run.

    Raises:
        ConfigError: in a file with rounds, a step reads the output of a later step, or a student is
            trained into its own directory.
        PipelineError: a student cannot be trained on the caches made before it; the error of
            `train-student`.
    """
    encodings = _encodings(steps)
    for _, config in steps:
        if isinstance(config, TrainStudentConfig):
            where = f"{file.path}: train-student {config.output}"
            if place_of(config.student) == place_of(config.output):
                raise ConfigError(
                    f"{where}: student and output are one directory, which training would overwrite; name another output"
                )
            try:
                _check_mixture(config, encodings)
            except PipelineError as error:
                raise type(error)(f"{where}: {error}") from None
    if file.rounds is not None:
        _check_order(file, steps)


def check_caches(file: ConfigFile, steps: Sequence[Resolved]) -> None:
    """Check that each cache that a step reads is there, or is the output of a step.

    Raises:
        ConfigError: one is not.
    """
    made = {place_of(config.output): config.output for _, config in steps if config.output is not None}
    for step, config in steps:
        caches = getattr(config, "cache", None) or ()
        for name in (caches,) if isinstance(caches, str) else caches:
            path = name_and_path(name)[1]
            if is_url(path) or place_of(path) in made or os.path.exists(os.path.expanduser(path)):
                continue
            near = difflib.get_close_matches(path, made.values(), n=1)
            raise ConfigError(
                f"{file.path}: {step.stage}: cache: {path} is not there, and no stage that is run makes it"
                + (f"; did you mean {near[0]}?" if near else "")
            )


def _check_order(file: ConfigFile, steps: Sequence[Resolved]) -> None:
    """Check that no step reads the output of a later one.

    In a second run it would read the output of the first run.
    """
    made: dict[str, Step] = {}
    for step, config in steps:
        if config.output is not None:
            made.setdefault(place_of(config.output), step)
    done: set[str] = set()
    for step, config in steps:
        for name in sorted(named_inputs(config)):
            later = made.get(place_of(name))
            if later is not None and place_of(name) not in done:
                raise ConfigError(
                    f"{file.path}: {step.stage}{_in_round(step)} reads {name}, which {later.stage} makes later"
                    f"{_in_round(later)}; a round reads what stages before it and the rounds before have made: {{previous}}"
                )
        if config.output is not None:
            done.add(place_of(config.output))


def _check_mixture(config: TrainStudentConfig, encodings: Mapping[str, Encoding]) -> None:
    """Check a student's mixture and divergence against the caches that this file makes."""
    from pipeline.training.batches.mixing import checked_kind
    from pipeline.training.divergences import check_divergence
    from pipeline.training.scores import check_score_loss

    if len(config.cache) > 1:
        checked_kind(len(config.cache), config.mix_kind, config.teacher_weight or config.proportion)
    known = [(cache, encodings[place_of(cache)]) for cache in config.cache if place_of(cache) in encodings]
    for cache, encoding in known:
        if config.divergence is not None and config.soft_weight != 0:
            try:
                loss, is_score = config.loss_over(Loss()), isinstance(encoding, Score)
                check_score_loss(loss, is_score=is_score, has_groups=True, teacher_labels=False)
                if not is_score:
                    check_divergence(encoding, loss)
            except PipelineError as error:
                raise type(error)(f"{cache}: {error}") from None
        first, expected = known[0]
        if config.mix_kind == "data" and encoding != expected:
            raise ContractError(
                f"{cache}: encoding: expected {encoding_text(expected)}, as {first} has, found {encoding_text(encoding)}; rows "
                "that are mixed need one encoding"
            )


def _encodings(steps: Sequence[Resolved]) -> dict[str, Encoding]:
    """Map the place of each cache that the file makes to its encoding."""
    return {
        place_of(config.output): config.resolve_encoding(get_task(config.task).default_encoding.kind)
        for _, config in steps
        if isinstance(config, CacheLogitsConfig)
    }


def _in_round(step: Step) -> str:
    return "" if step.round is None else f" in round {step.round}"


# ---------------------------------------------------------- warnings that do not stop the run


def warn_of_steps(steps: Sequence[Resolved]) -> None:
    """Log a warning for each setting that makes rounds less useful than intended."""
    for line in itertools.chain(_one_seed(steps), _mixed_alike(steps), _held_out(steps)):
        logger.warning("%s", line)


def _one_seed(steps: Sequence[Resolved]) -> Iterator[str]:
    """Warn if two rounds use the same prompts with the same seed."""
    seen: dict[tuple[Any, ...], int] = {}
    for step, config in steps:
        if not isinstance(config, GenerateConfig) or step.round is None or config.temperature == 0:
            continue
        prompts = (config.dataset, config.data_files, config.split, config.rows, config.template, config.num_examples)
        first = seen.setdefault((config.seed, *prompts), step.round)
        if first != step.round:
            yield (
                f"generate: seed {config.seed} on the same prompts in round {first} and in round {step.round}: equal "
                'prompts get equal random numbers; seed: "{round}" gives other samples in each round'
            )
            return


def _mixed_alike(steps: Sequence[Resolved]) -> Iterator[str]:
    """Warn if `proportion` selects the same rows of one cache in every round."""
    seen: dict[tuple[int, str], int] = {}
    for step, config in steps:
        if not isinstance(config, TrainStudentConfig) or step.round is None or not config.proportion:
            continue
        seed = config.training.get("data_seed") or config.seed
        for cache in config.cache:
            first = seen.setdefault((seed, place_of(cache)), step.round)
            if first != step.round:
                yield (
                    f"train-student: seed {seed} in round {first} and in round {step.round}: its proportion of {cache} takes the "
                    'same rows in each; seed: "{round}" takes other rows'
                )
                return


def _held_out(steps: Sequence[Resolved]) -> Iterator[str]:
    """Warn if `holdout` applies to prompts or generated rows, since `generate` ignores it."""
    written = {place_of(config.output): config for _, config in steps if isinstance(config, GenerateConfig)}
    shares = {
        place_of(config.data.dataset): (config.output, config.data.holdout)
        for _, config in steps
        if isinstance(config, CacheLogitsConfig) and config.data.holdout
    }
    told: set[str] = set()
    for place, (output, share) in shares.items():
        if place in written and "rows" not in told:
            told.add("rows")
            yield (
                f"cache-logits {output}: holdout {share:g} sets aside some of the generated rows, which are not trained on; "
                "holdout: 0 under data: of this section takes all"
            )
    for config in written.values():
        output, share = shares.get(place_of(config.dataset), ("", 0.0)) if config.dataset is not None else ("", 0.0)
        if share and (not config.split or "train" in config.split) and "prompts" not in told:
            told.add("prompts")
            yield (
                f"generate {config.output}: {config.dataset}: writes after all rows of train, those that holdout {share:g} sets "
                f"aside as test in {output} included; write the two splits into files of their own"
            )
