"""predict."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from pipeline import config as cfg
from pipeline.cli.commands import command

if TYPE_CHECKING:
    from pipeline.records import TextPrediction


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
    """One line, with what there is: labels or a continuation."""
    known = {name: value for name, value in dataclasses.asdict(found).items() if value not in (None, {})}
    return json.dumps(known, ensure_ascii=False)


def _shown(found: TextPrediction) -> str:
    """A text and, indented, what the model says of it."""
    text = found.text if len(found.text) <= 80 else found.text[:77] + "..."
    if found.continuation is not None:
        return f"{text!r} goes on:\n  {' '.join(found.continuation.split())}"
    width = max(map(len, found.labels))
    return "\n".join([repr(text), *(f"  {label.ljust(width)}  {p:6.1%}" for label, p in found.labels.items())])
