"""Whether students perform as well as their teacher: report."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline import config as cfg
from pipeline.cli.commands import command


@command(
    "report",
    cfg.ReportConfig,
    "softlabel report --cache runs/cache --teacher runs/teacher --student runs/student --control labels=runs/control --output runs/report",
)
def _report(config: cfg.ReportConfig) -> None:
    from pipeline.cache.format.manifest import dump
    from pipeline.evaluation.report.report import report
    from pipeline.evaluation.report.summary import summary

    found = report(config)
    if config.json:
        click.echo(dump(found), nl=False)
        return
    click.echo(summary(found))
    click.echo(f"\nkept in {Path(config.output, 'report.html')}, report.md, report.json and figures")
