"""`softlabel generate --dry-run`: what a run would read and write."""

from __future__ import annotations

import contextlib

from pipeline.capture.engines.progress import shards_of
from pipeline.capture.engines.workers import check_engine
from pipeline.config import GenerateConfig
from pipeline.generation.job import GenerationJob, few_prompts, prepare
from pipeline.generation.run import GENERATION, show_first
from pipeline.generation.shard import read_prompts
from pipeline.records import Outline

#: Number of rows whose prompts are tokenized for the estimates.
_SAMPLE = 64


def outline(config: GenerateConfig) -> Outline:
    """Describe a run after all checks that come before its first batch; write nothing.

    Raises:
        PipelineError: as in `run`.
    """
    check_engine(config)
    job = prepare(config, dry_run=True)
    with contextlib.closing(job.writer):
        return _outline(config, job)


def _outline(config: GenerateConfig, job: GenerationJob) -> Outline:
    sampling, contract = job.plan.contract.sampling, job.plan.contract
    mine = shards_of(job.plan, config.parsed_part)
    waiting = mine if config.overwrite else GENERATION.outstanding(job.layout, job.plan, config.parsed_part)
    rows = sum(shard.stop - shard.start for shard in waiting)
    source = job.prompts.source
    read = ", ".join(f"{split} {stop - start:,} rows" for split, (start, stop) in job.prompts.ranges.items())
    settings = contract.prompts
    made = {
        "texts": "texts, each one turn of the user" if settings.as_chat else "texts",
        "chats": "chats, up to where the assistant writes",
        "prefixes": f"the first {settings.prefix_tokens} tokens of each text",
        "template": f"a template for {len(settings.labels)} labels: {', '.join(settings.labels[:5])}",
    }[settings.kind]
    filters = [f"{name} {value}" for name, value in _filters(config) if value is not None]
    there = f"; {len(mine) - len(waiting):,} are there already" if len(waiting) < len(mine) else ""
    most = max((shard.stop - shard.start for shard in mine), default=0)
    lines = [
        ("reads", f"{source.name}: {read}" if source is not None and config.template is None else read),
        ("prompts", made),
        ("model", f"{job.writer.name}, on {job.writer.device}"),
        (
            "draws",
            f"{sampling.num_samples:,} completions of each prompt, of up to {sampling.max_new_tokens:,} tokens, temperature "
            f"{sampling.temperature:g}{''.join(f', {text}' for text in filters)}, seed {sampling.seed}",
        ),
        ("drops", ", ".join(contract.dropped) or "none"),
        ("batches", f"{contract.batch_tokens:,} tokens: prompts with their new tokens, padding included"),
        ("columns", ", ".join(contract.columns)),
        ("writes", f"{job.layout.name}: {len(mine):,} shards of up to {most:,} prompts{there}"),
        (
            "work",
            f"{rows * sampling.num_samples:,} completions, up to {rows * sampling.num_samples * sampling.max_new_tokens:,} tokens",
        ),
    ]
    if not waiting:
        return (*lines[:-1], ("work", "none: nothing is left to do"))
    first = waiting[0]
    read_prompts(job, type(first)(first.name, first.split, first.start, min(first.start + _SAMPLE, first.stop)))
    show_first(job, sample=False)
    job.writer.check(few_prompts(job), batch_tokens=contract.batch_tokens)
    return tuple(lines)


def _filters(config: GenerateConfig) -> tuple[tuple[str, float | None], ...]:
    return (("top-p", config.top_p), ("top-k", config.top_k), ("min-p", config.min_p))
