"""The commands push and pull."""

from __future__ import annotations

import click

from pipeline import config as cfg
from pipeline.cli.commands import command
from pipeline.cli.echo import echo_cache
from pipeline.records import Outline


def _outline_push(config: cfg.PushConfig) -> Outline:
    from pipeline.sharing.push import outline

    return outline(config)


def _outline_pull(config: cfg.PullConfig) -> Outline:
    from pipeline.sharing.pull import outline

    return outline(config)


@command(
    "push",
    cfg.PushConfig,
    "softlabel push --cache runs/cache --to hf://datasets/ORG/NAME --license apache-2.0",
    outline=_outline_push,
)
def _push(config: cfg.PushConfig) -> None:
    from pipeline.cache.format.manifest import dump
    from pipeline.sharing.push import run

    pushed = run(config)
    if config.json:
        click.echo(dump(pushed), nl=False)
        return
    click.echo(f"pushed: {pushed.url}  cache_id {pushed.cache_id[:16]}, {pushed.sent_bytes:,} bytes of shards sent")
    if pushed.commit is not None:
        click.echo(f"commit: {pushed.commit}")


@command(
    "pull",
    cfg.PullConfig,
    "softlabel pull --from hf://datasets/ORG/NAME@REVISION --output runs/cache --split test",
    outline=_outline_pull,
)
def _pull(config: cfg.PullConfig) -> None:
    from pipeline.cache.format.manifest import dump
    from pipeline.sharing.pull import run

    cache = run(config)
    if config.json:
        click.echo(dump(cache.manifest), nl=False)
    else:
        echo_cache(cache, config.output)
