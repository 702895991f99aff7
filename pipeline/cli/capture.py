"""The commands train-teacher, cache-logits and estimate."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pipeline import config as cfg
from pipeline.cli.commands import command
from pipeline.cli.echo import echo_cache
from pipeline.records import Outline


def _outline_teacher(config: cfg.TrainTeacherConfig) -> Outline:
    from pipeline.outlines.training import outline_teacher

    return outline_teacher(config)


def _outline_capture(config: cfg.CacheLogitsConfig) -> Outline:
    from pipeline.outlines.capture import outline

    return outline(config)


@command(
    "train-teacher",
    cfg.TrainTeacherConfig,
    "softlabel train-teacher --task sequence-classification --model bert-base-uncased --dataset data/bbc --output runs/teacher",
    outline=_outline_teacher,
)
def _train_teacher(config: cfg.TrainTeacherConfig) -> None:
    from pipeline.metrics import on_split
    from pipeline.training.teacher import run

    metrics = run(config)
    kept = json.loads(Path(config.output, "metrics.json").read_text(encoding="utf-8"))
    measured = (
        on_split(metrics, kept["split"], kept["measured_rows"], "labelled rows")
        if metrics
        else "not measured, the data set has neither validation nor test"
    )
    click.echo(f"teacher: {config.output}  {measured}; trained on train, {kept['rows']:,} labelled rows")


@command(
    "cache-logits",
    cfg.CacheLogitsConfig,
    "softlabel cache-logits --task sequence-classification --teacher runs/teacher --dataset data/bbc --output runs/cache",
    outline=_outline_capture,
)
def _cache_logits(config: cfg.CacheLogitsConfig) -> None:
    from pipeline.capture.run import run

    cache = run(config)
    if cache is None:
        click.echo(f"part {config.part} is done; whoever makes the last shard finishes the cache")
    else:
        echo_cache(cache, config.output)


@command(
    "estimate",
    cfg.EstimateConfig,
    "softlabel estimate --task causal-lm --teacher runs/teacher --dataset data/corpus --budget 100GB --write-config runs/capture.yaml",
)
def _estimate(config: cfg.EstimateConfig) -> None:
    from pipeline.cache.format.manifest import dump
    from pipeline.capture.estimate.run import run
    from pipeline.capture.estimate.table import format_estimate

    found = run(config)
    click.echo(dump(found) if config.json else format_estimate(found), nl=not config.json)
