"""The command evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline import config as cfg
from pipeline.cli.commands import command
from pipeline.errors import IntegrityError
from pipeline.records import Outline

if TYPE_CHECKING:
    from pipeline.records import EvaluationReport


def _outline_evaluation(config: cfg.EvaluateConfig) -> Outline:
    from pipeline.evaluation.run import outline

    return outline(config)


@command(
    "evaluate",
    cfg.EvaluateConfig,
    "softlabel evaluate --cache runs/cache --student runs/student --student control=runs/control",
    outline=_outline_evaluation,
)
def _evaluate(config: cfg.EvaluateConfig) -> None:
    from pipeline.evaluation.run import run

    _echo_report(run(config), config)


def _echo_report(report: EvaluationReport, config: cfg.EvaluateConfig) -> None:
    from pipeline.cache.format.manifest import dump
    from pipeline.evaluation import format_table

    if config.json:
        click.echo(dump(report), nl=False)
        return
    click.echo(format_table(report))
    if config.output is not None:
        click.echo(f"\nkept in {Path(config.output, 'evaluation.json')}")


def show_evaluation(config: cfg.EvaluateConfig) -> None:
    """Print the stored evaluation."""
    from pipeline.cache.format.manifest import parse
    from pipeline.records import EvaluationReport

    if config.output is not None:
        try:
            _echo_report(parse(EvaluationReport, Path(config.output, "evaluation.json")), config)
        except IntegrityError:  # nan is stored as null
            click.echo(f"kept in {Path(config.output, 'evaluation.json')}")
