"""The command init."""

from __future__ import annotations

from collections.abc import Iterator
from shlex import quote
from textwrap import fill
from typing import TYPE_CHECKING

import click

from pipeline import config as cfg
from pipeline.cli.commands import command

if TYPE_CHECKING:
    from pipeline.starter.records import Start


@command(
    "init", cfg.InitConfig, "softlabel init --dataset tickets.csv --unlabelled more-tickets.csv --output distil.yaml"
)
def _init(config: cfg.InitConfig) -> None:
    from pipeline.starter import run

    start = run(config)
    for name, text in _findings(start):
        click.echo(fill(text, 110, initial_indent=f"{name:<10}", subsequent_indent=" " * 10, break_on_hyphens=False))
    click.echo(f"\nwritten to {config.output}; look at it, then\n    softlabel run {quote(config.output)}")


def _findings(start: Start) -> Iterator[tuple[str, str]]:
    """Yield label and text of each finding and choice."""
    from pipeline.starter.cautions import label_cautions, text_cautions
    from pipeline.starter.page import class_line, few_line, length_line, moved_line, other_columns, split_line
    from pipeline.starter.roles import summary

    yield "task", start.task
    for name in start.inputs:
        yield "text", f"column {name!r}: {summary(start.facts[name])}"
    if start.roles.label is not None:
        yield "label", f"column {start.roles.label!r}: {class_line(start)}"
    for caution in (*label_cautions(start), *text_cautions(start)):
        yield "caution", caution
    if start.others:
        yield "not read", f"{other_columns(start)}"
    for split in start.counts.splits:
        held = " Held out of train by content." if split == "test" and start.data.holdout else ""
        yield "rows", split_line(start, split) + held
    for file, rows in start.unlabelled_files.items():
        yield "", f"of these, {rows:,} of {file} without a label"
    if moved := moved_line(start):
        yield "caution", moved
    for pair, number in start.counts.shared.items():
        yield "caution", f"equal inputs in both of the splits {pair}: {number:,}"
    if few := few_line(start):
        yield "caution", few
    yield "tokens", f"{length_line(start)} max_length: {start.lengths.chosen}"
    yield "teacher", start.known.name + ("" if start.is_teacher else ", fine-tuned first")
