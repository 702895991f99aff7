"""`softlabel cache-logits --dry-run`: what a capture would read and write, and its duration."""

from __future__ import annotations

import time

from pipeline.cache.writing.build import noted_answer, refresh
from pipeline.cache.writing.claims import finished
from pipeline.capture.engines.progress import shards_of
from pipeline.capture.engines.workers import check_engine
from pipeline.capture.head import check_head, check_rows, show_first_row
from pipeline.capture.job import Job, prepare
from pipeline.capture.plan import plan_batches
from pipeline.capture.shard import forward
from pipeline.capture.space import sample_rows, warn_of_full_disk
from pipeline.config import CacheLogitsConfig
from pipeline.progress import duration, size
from pipeline.records import Outline, TokenizedExample
from pipeline.softlabels.names import encoding_name

_PASSES = 3


def outline(config: CacheLogitsConfig) -> Outline:
    """Describe a capture after all checks that come before its first batch; write nothing.

    Raises:
        PipelineError: as in `run`.
    """
    check_engine(config)
    job = prepare(config, dry_run=True)
    try:
        return _outline(config, job)
    finally:
        job.teacher.close()


def _outline(config: CacheLogitsConfig, job: Job) -> Outline:
    refresh(job.layout)
    mine = shards_of(job.plan, config.parsed_part)
    waiting = [shard for shard in mine if config.overwrite or finished(job.layout, shard) is None]
    rows = sum(shard.stop - shard.start for shard in waiting)
    needed = warn_of_full_disk(job, waiting, overwrite=config.overwrite) if waiting else 0
    contract = job.plan.contract
    splits = {split: len(rows) for split, rows in job.source.splits.items()}
    lines = [
        ("reads", f"{job.source.name}: {', '.join(f'{split} {count:,} rows' for split, count in splits.items())}"),
        ("teacher", job.teacher.describe(contract.teacher)),
        ("encoding", f"{encoding_name(contract.encoding)} over {contract.num_classes:,} classes"),
        ("columns", ", ".join(contract.columns)),
        (
            "batches",
            f"{contract.batch_tokens:,} images"
            if job.task.reads == "images"
            else f"{contract.batch_tokens:,} tokens, padding included; rows of at most {contract.tokenization.max_length:,}",
        ),
    ]
    there = f"; {len(mine) - len(waiting):,} are there already" if len(waiting) < len(mine) else ""
    most = max(shard.stop - shard.start for shard in mine) if mine else 0
    lines.append(
        (
            "writes",
            f"{job.layout.name}: {len(mine):,} shards of up to {most:,} rows{there}; about {size(needed)} to write",
        )
    )
    if not waiting:
        return (*lines, ("time", "none: nothing is left to do"))
    show_first_row(job)
    check_rows(job, waiting)
    check_head(job, lambda _: None if config.overwrite else noted_answer(job.layout))
    return (*lines, *_time(job, rows))


def _time(job: Job, rows: int) -> Outline:
    """Estimate the duration from one batch that is run a few times; the first run warms up."""
    examples, source_rows = sample_rows(job)
    if not examples:
        return ()
    members, length = plan_batches([example.num_tokens for example in examples], job.plan.contract.batch_tokens)[0]
    batch = [examples[i] for i in members]
    seconds = min(_seconds(job, batch, length) for _ in range(_PASSES))
    unit = "images" if job.task.reads == "images" else "tokens"
    speed = sum(example.num_tokens for example in batch) / seconds
    tokens = sum(example.num_tokens for example in examples) / source_rows * rows
    return (
        (unit, f"about {tokens:,.0f} in {rows:,} rows, from {source_rows} of them"),
        (
            "time",
            f"about {duration(tokens / speed)} of the teacher in one process, at {speed:,.0f} {unit}/s (one batch of {len(batch)} rows); loading, encoding and writing are not included",
        ),
    )


def _seconds(job: Job, batch: list[TokenizedExample], length: int) -> float:
    started = time.perf_counter()
    forward(job, batch, length).result()
    return time.perf_counter() - started
