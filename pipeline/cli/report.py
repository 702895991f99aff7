"""The command report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline import config as cfg
from pipeline.cli.commands import command
from pipeline.errors import IntegrityError

if TYPE_CHECKING:
    from pipeline.evaluation.records import Report
    from pipeline.records import Outline


def _outline_report(config: cfg.ReportConfig) -> Outline:
    from pipeline.outlines.checks import outline_report

    return outline_report(config)


@command(
    "report",
    cfg.ReportConfig,
    "softlabel report --cache runs/cache --teacher runs/teacher --student runs/student --control labels=runs/control --output runs/report",
    outline=_outline_report,
)
def _report(config: cfg.ReportConfig) -> None:
    from pipeline.evaluation.report.report import report

    _echo(report(config), config)


def _echo(found: Report, config: cfg.ReportConfig) -> None:
    from pipeline.cache.format.manifest import dump
    from pipeline.evaluation.report.summary import summary

    if config.json:
        click.echo(dump(found), nl=False)
        return
    click.echo(summary(found))
    _echo_place(config)


def _echo_place(config: cfg.ReportConfig) -> None:
    click.echo(f"\nkept in {Path(config.output, 'report.html')}, report.md, report.json and figures")


def show_report(config: cfg.ReportConfig) -> None:
    """Print the stored report."""
    from pipeline.cache.format.manifest import parse
    from pipeline.evaluation.records import Report

    try:
        _echo(parse(Report, Path(config.output, "report.json")), config)
    except IntegrityError:  # nan is stored as null
        _echo_place(config)
