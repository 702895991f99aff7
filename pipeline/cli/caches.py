"""The commands verify, audit, inspect and import."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline import config as cfg
from pipeline.cli.commands import command
from pipeline.cli.echo import echo_cache
from pipeline.records import Outline


def _outline_verify(config: cfg.VerifyConfig) -> Outline:
    from pipeline.outlines.checks import outline_verify

    return outline_verify(config)


@command("verify", cfg.VerifyConfig, "softlabel verify --cache runs/cache", outline=_outline_verify)
def _verify(config: cfg.VerifyConfig) -> None:
    from pipeline.cache import Cache, drop_broken, verify
    from pipeline.cache.format.manifest import dump
    from pipeline.cache.storage.urls import is_url

    if is_url(config.cache):
        Cache.open(config.cache, verify="full")  # raises the error
    found = verify(Path(config.cache), quick=config.quick)
    if config.json:
        click.echo(dump(found), nl=False)
    elif not found.problems:
        click.echo(
            f"{config.cache}: whole. {found.shards} shards, {found.rows:,} rows, {found.positions:,} positions, {found.bytes:,} bytes; cache_id {found.cache_id[:16]}"
        )
    for problem in found.problems:
        click.echo(f"Error: {problem}", err=True)
    if config.repair and found.broken:
        drop_broken(Path(config.cache), found)
        click.echo(f"dropped {', '.join(found.broken)}; run the same softlabel cache-logits again", err=True)
    if found.problems:
        click.get_current_context().exit(1)


def _outline_audit(config: cfg.AuditConfig) -> Outline:
    from pipeline.outlines.checks import outline_audit

    return outline_audit(config)


@command(
    "audit",
    cfg.AuditConfig,
    "softlabel audit --cache runs/cache --teacher runs/teacher --rows 64",
    outline=_outline_audit,
)
def _audit(config: cfg.AuditConfig) -> None:
    from pipeline.cache.format.manifest import dump
    from pipeline.capture.audit import describe, run

    found = run(config)
    click.echo(dump(found) if config.json else describe(found), nl=not config.json)
    if found.verdict != "agrees":
        click.echo(
            f"Error: {config.cache}: differs from {config.teacher} by more than its numerical noise; make the cache again, or find out what changed it",
            err=True,
        )
        click.get_current_context().exit(1)


@command("inspect", cfg.InspectConfig, "softlabel inspect --cache runs/cache --rows 3")
def _inspect(config: cfg.InspectConfig) -> None:
    import json

    from pipeline.cache import Cache
    from pipeline.cache.format.manifest import dump
    from pipeline.cache.views.inspection import describe, totals

    cache = Cache.open(
        config.cache,
        cache_dir=config.cache_dir,
        cache_bytes=cfg.parse_bytes("--cache-bytes", config.cache_bytes),
    )
    if config.json:
        click.echo(json.dumps({"totals": totals(cache), "manifest": json.loads(dump(cache.manifest))}, indent=1))
        return
    asked = {"rows": config.rows, "tokens": config.tokens, "top": config.top}
    given = {name: value for name, value in asked.items() if value is not None}
    if config.html is not None:
        from pipeline.cache.views.page import write_page

        write_page(cache, Path(config.html), split=config.split, **given)
        click.echo(f"page: {config.html}")
        return
    for line in describe(cache, split=config.split, **{"rows": 2, "tokens": 24, "top": 4, **given}):
        click.echo(line)


def _outline_import(config: cfg.ImportConfig) -> Outline:
    from pipeline.sharing.importers import outline

    return outline(config)


@command(
    "import",
    cfg.ImportConfig,
    "softlabel import --input responses.jsonl --tokenizer Qwen/Qwen3-8B --teacher Qwen/Qwen3-8B --top-k 20 --output runs/cache",
    outline=_outline_import,
)
def _import(config: cfg.ImportConfig) -> None:
    from pipeline.sharing.importers import run

    echo_cache(run(config), config.output)
