"""merge, filter, convert."""

from __future__ import annotations

from pipeline import config as cfg
from pipeline.cli.commands import command
from pipeline.cli.echo import echo_cache


@command("merge", cfg.MergeConfig, "softlabel merge --cache runs/may --cache runs/june --output runs/both")
def _merge(config: cfg.MergeConfig) -> None:
    from pipeline.cache.transforms import merge

    echo_cache(merge(config.cache, config.output, overwrite=config.overwrite), config.output)


@command(
    "filter",
    cfg.FilterConfig,
    "softlabel filter --cache runs/cache --where 'hash(content_hash) % 10 = 0' --output runs/tenth",
)
def _filter(config: cfg.FilterConfig) -> None:
    from pipeline.cache.transforms import filter_rows

    made = filter_rows(
        config.cache,
        config.output,
        where=config.where,
        splits=config.split,
        as_split=config.as_split,
        overwrite=config.overwrite,
    )
    echo_cache(made, config.output)


@command(
    "convert",
    cfg.ConvertConfig,
    "softlabel convert --cache runs/full --encoding sampled --sample-size 25 --output runs/sampled",
)
def _convert(config: cfg.ConvertConfig) -> None:
    from pipeline.cache import Cache
    from pipeline.cache.transforms import convert

    cache = Cache.open(config.cache)
    source = cache.manifest.contract.encoding
    own = getattr(source, "temperatures", None) or (getattr(source, "temperature", None),)
    temperatures = config.temperature or tuple(t for t in own if t is not None)
    if config.encoding == "sampled" and not config.temperature:
        temperatures = temperatures[:1]
    encoding = cfg.make_encoding(config.encoding, config.top_k, config.top_p, config.sample_size, temperatures)
    echo_cache(convert(cache, config.output, encoding=encoding, overwrite=config.overwrite), config.output)
