"""The commands sweep and predict."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from pipeline import config as cfg
from pipeline.cli.commands import command
from pipeline.errors import TrainingError
from pipeline.records import Outline

if TYPE_CHECKING:
    from pipeline.records import TextPrediction


def _outline_sweep(config: cfg.SweepConfig) -> Outline:
    from pipeline.sweep.run import outline

    return outline(config)


@command(
    "sweep",
    cfg.SweepConfig,
    "softlabel sweep --cache runs/cache --teacher runs/teacher --shape 2x128x2 --shape 4x256x4 --temperature 1 --temperature 4 --output runs/sweep",
    outline=_outline_sweep,
)
def _sweep(config: cfg.SweepConfig) -> None:
    from pipeline.cache.format.manifest import dump
    from pipeline.sweep import format_leaderboard, report, run

    found = run(config)
    click.echo(dump(found) if config.json else format_leaderboard(found), nl=not config.json)
    table = report(config, found)
    if table and not config.json:
        click.echo(f"\n{table}")
    if found.failed:
        first = found.failed[0]
        raise TrainingError(
            f"{len(found.failed)} of {len(found.runs)} runs failed, the first of them {first.name}: {first.error}; the others are whole, "
            f"and the same command tries the failed ones again"
        )


@command(
    "predict",
    cfg.PredictConfig,
    'softlabel predict --model runs/bbc/student --text "The bank raised its profit forecast."',
)
def _predict(config: cfg.PredictConfig) -> None:
    from pipeline.models.predict import run

    for found in run(config):
        click.echo(_as_json(found) if config.json else _shown(found))


def _as_json(found: TextPrediction) -> str:
    """A prediction as one line of JSON: labels, scores, a continuation, or words."""
    known = {name: value for name, value in dataclasses.asdict(found).items() if value not in (None, {}, ())}
    return json.dumps(known, ensure_ascii=False)


def _shown(found: TextPrediction) -> str:
    """Format a text with the model's predictions, indented below it."""
    text = found.text if len(found.text) <= 80 else found.text[:77] + "..."
    if found.continuation is not None:
        return f"{text!r} continues:\n  {' '.join(found.continuation.split())}"
    if found.target is not None:
        return f"{text!r}\n  {found.target}"
    if found.words:
        words = [each.word if each.word.isprintable() else repr(each.word) for each in found.words]
        width, of_label = max(map(len, words)), max(len(each.label) for each in found.words)
        lines = [
            f"  {word.ljust(width)}  {each.label.ljust(of_label)}  {each.probability:6.1%}"
            for word, each in zip(words, found.words, strict=True)
        ]
        return "\n".join([repr(text), *lines])
    if found.scores:
        width = max(map(len, found.scores))
        return "\n".join([repr(text), *(f"  {name.ljust(width)}  {score:.4g}" for name, score in found.scores.items())])
    labels = {label or "(no answer)": p for label, p in found.labels.items()}
    width = max(map(len, labels))
    return "\n".join([repr(text), *(f"  {label.ljust(width)}  {p:6.1%}" for label, p in labels.items())])
