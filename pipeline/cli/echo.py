"""Output that several commands share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pipeline.cache import Cache
    from pipeline.records import Outline


def echo_cache(cache: Cache, output: str) -> None:
    """Print the size of each split of a cache."""
    from pipeline.cache.views.inspection import labelled, totals
    from pipeline.cache.views.units import unit_of
    from pipeline.sources.files.loading import redact
    from pipeline.tasks import get_task

    click.echo(f"cache: {redact(output)}  cache_id {cache.manifest.cache_id[:16]}")
    unit = unit_of(get_task(cache.manifest.contract.task))
    labels, of = labelled(cache), {"words": "labelled words", "labels": "known labels"}.get(unit, "labelled")
    for split, total in totals(cache).items():
        known = f", {labels[split]:,} {of}" if split in labels else ""
        click.echo(
            f"  {split}: {total['rows']:,} rows{known}, {total['positions']:,} positions, {total['bytes']:,} bytes ({total['bytes_per_position']:,.1f} a position)"
        )
    if cache.manifest.bad_rows:
        count = cache.manifest.bad_rows
        click.echo(f"  {count} {'row' if count == 1 else 'rows'} set aside, listed in reports/bad-rows.tsv")


def echo_outline(name: str, lines: Outline) -> None:
    """Print what a command would do."""
    if os.environ.get("RANK", "0") != "0":  # print once under torchrun
        return
    width = max((len(what) for what, _ in lines), default=0)
    click.echo(f"{name}: dry run, no output is written")
    for what, said in lines:
        click.echo(f"  {what.ljust(width)}  {said}")
