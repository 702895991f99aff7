"""The command generate."""

from __future__ import annotations

import click

from pipeline import config as cfg
from pipeline.cli.commands import command
from pipeline.records import Outline


def _outline(config: cfg.GenerateConfig) -> Outline:
    from pipeline.outlines.generation import outline

    return outline(config)


@command(
    "generate",
    cfg.GenerateConfig,
    "softlabel generate --model runs/teacher --dataset prompts.jsonl --num-samples 4 --temperature 0.8 --output data/written",
    outline=_outline,
)
def _generate(config: cfg.GenerateConfig) -> None:
    from pipeline.generation.run import run

    found = run(config)
    if found is None:
        click.echo(f"part {config.part} is done; whoever makes the last shard finishes the data set")
        return
    counts = found.counts
    splits = ", ".join(dict.fromkeys(shard.split for shard in found.end.shards))
    click.echo(
        f"data set: {config.output}  {counts.kept:,} of {counts.completions:,} completions ({splits}), {counts.tokens:,} tokens; "
        f"{found.end.generation_id[:12]}"
    )
