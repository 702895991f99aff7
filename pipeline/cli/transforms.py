"""The commands merge, filter and convert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline import config as cfg
from pipeline.cli.commands import command
from pipeline.cli.echo import echo_cache
from pipeline.records import Outline

if TYPE_CHECKING:
    from pipeline.cache.transforms.rewrite import Rewrite


def _planned_merge(config: cfg.MergeConfig) -> Rewrite:
    from pipeline.cache.transforms.merge import plan_merge

    return plan_merge(config.cache, config.output)


def _planned_filter(config: cfg.FilterConfig) -> Rewrite:
    from pipeline.cache.transforms.filter import plan_filter

    return plan_filter(config.cache, config.output, where=config.where, splits=config.split, as_split=config.as_split)


def _planned_convert(config: cfg.ConvertConfig) -> Rewrite:
    from pipeline.cache import Cache
    from pipeline.cache.transforms.convert import plan_convert

    cache = Cache.open(config.cache)
    source = cache.manifest.contract.encoding
    own = getattr(source, "temperatures", None) or (getattr(source, "temperature", None),)
    temperatures = config.temperature or tuple(t for t in own if t is not None)
    if config.encoding == "sampled" and not config.temperature:
        temperatures = temperatures[:1]
    encoding = cfg.make_encoding(config.encoding, config.top_k, config.top_p, config.sample_size, temperatures)
    return plan_convert(cache, config.output, encoding=encoding)


def _outline(planned: Rewrite, config: cfg.MergeConfig | cfg.FilterConfig | cfg.ConvertConfig) -> Outline:
    from pipeline.cache.transforms.rewrite import outline

    return outline(planned, overwrite=config.overwrite)


def _make(planned: Rewrite, config: cfg.MergeConfig | cfg.FilterConfig | cfg.ConvertConfig) -> None:
    from pipeline.cache.transforms.rewrite import rewrite

    echo_cache(rewrite(planned, overwrite=config.overwrite), config.output)


@command(
    "merge",
    cfg.MergeConfig,
    "softlabel merge --cache runs/may --cache runs/june --output runs/both",
    outline=lambda config: _outline(_planned_merge(config), config),
)
def _merge(config: cfg.MergeConfig) -> None:
    _make(_planned_merge(config), config)


@command(
    "filter",
    cfg.FilterConfig,
    "softlabel filter --cache runs/cache --where 'hash(content_hash) % 10 = 0' --output runs/tenth",
    outline=lambda config: _outline(_planned_filter(config), config),
)
def _filter(config: cfg.FilterConfig) -> None:
    _make(_planned_filter(config), config)


@command(
    "convert",
    cfg.ConvertConfig,
    "softlabel convert --cache runs/full --encoding sampled --sample-size 25 --output runs/sampled",
    outline=lambda config: _outline(_planned_convert(config), config),
)
def _convert(config: cfg.ConvertConfig) -> None:
    _make(_planned_convert(config), config)
