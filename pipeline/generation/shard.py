"""Generation of one shard: source rows -> prompts -> completions -> Parquet -> receipt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from pipeline.cache.storage.crash import reached
from pipeline.cache.writing.build import record
from pipeline.cache.writing.writer import regroup, write_row_groups
from pipeline.errors import BadRowError
from pipeline.generation.job import GenerationJob, problem_of
from pipeline.generation.prompts import TOO_SHORT
from pipeline.generation.records import Asked, Completion
from pipeline.generation.schema import table_of
from pipeline.records import BadRow, Receipt, Shard, ShardPlan

#: Number of completions per Arrow table.
_TABLE_ROWS = 256


def write_shards(
    job: GenerationJob,
    shards: Iterable[ShardPlan],
    done: Callable[[Receipt], None],
    moved: Callable[[int, int], None],
) -> None:
    """Make shards one after another, independently of each other.

    Args:
        done: called with each receipt after it is on disk.
        moved: called after each batch with the source rows in proportion to its completions, and
            the number of generated tokens.

    Raises:
        BadRowError: a row cannot be a prompt, and the contract's `on_bad_row` is "stop".
        CacheError: a shard cannot be written.
        ModelError: out of memory.
    """
    for shard in shards:
        receipt = _write_shard(job, shard, moved)
        record(job.layout, receipt)
        done(receipt)


def read_prompts(job: GenerationJob, shard: ShardPlan) -> tuple[list[Asked], list[BadRow]]:
    """Return the completions to generate, by row and sample, and the rows that cannot be prompts.

    Raises:
        BadRowError: there is such a row, and the contract's `on_bad_row` is "stop".
    """
    asked: list[Asked] = []
    bad: list[BadRow] = []
    for item in job.prompts.read(shard.split, shard.start, shard.stop):
        problem = item.reason if isinstance(item, BadRow) else problem_of(job, item)
        if problem is not None:
            bad.append(BadRow(shard.split, item.source_row, problem))
            _stop_unless_skipped(job, bad[-1])
        elif not isinstance(item, BadRow):
            samples = range(job.plan.contract.sampling.num_samples)
            asked += [Asked(item, shard.split, sample) for sample in samples]
    return asked, bad


def _stop_unless_skipped(job: GenerationJob, row: BadRow) -> None:
    if job.plan.contract.on_bad_row == "stop" and not row.reason.startswith(TOO_SHORT):
        source = job.prompts.source
        where = f"{source.name}: " if source is not None else ""
        raise BadRowError(
            f"{where}split {row.split}, row {row.source_row}: {row.reason}; correct the row, or set such rows aside with "
            "--on-bad-row skip"
        )


def _write_shard(job: GenerationJob, shard: ShardPlan, moved: Callable[[int, int], None]) -> Receipt:
    started, writing = time.monotonic(), 0.0
    asked, bad = read_prompts(job, shard)
    sampling = job.plan.contract.sampling
    lengths = [each.num_tokens + sampling.max_new_tokens for each in asked]
    batches = job.writer.batches(lengths, job.plan.contract.batch_tokens)
    found: dict[int, Completion | BadRow] = {}
    told = 0
    for members, _ in batches:
        before = time.monotonic()
        completions = job.writer.write([asked[i] for i in members], sampling)
        writing += time.monotonic() - before
        found.update(zip(members, completions, strict=True))
        rows = (shard.stop - shard.start) * len(found) // len(asked)
        moved(rows - told, sum(len(each.token_ids) for each in completions if isinstance(each, Completion)))
        told = rows
    reached("shard:encoded")
    ordered: list[tuple[Asked, Completion]] = []
    for number, each in sorted(found.items()):
        if isinstance(each, BadRow):
            bad.append(each)
            _stop_unless_skipped(job, each)
        else:
            ordered.append((asked[number], each))
    tables = (table_of(ordered[i : i + _TABLE_ROWS], job.schema) for i in range(0, len(ordered), _TABLE_ROWS))
    written = write_row_groups(job.layout.shard(shard.name), shard, regroup(tables), job.schema)
    return Receipt(
        shard=written if ordered else Shard(shard.name, shard.split, 0, 0, 0, 0, "", ()),
        plan=shard,
        batches=tuple((len(members), length) for members, length in batches),
        device=job.writer.device,
        seconds=round(time.monotonic() - started, 3),
        forward_seconds=round(writing, 3),
        bad_rows=tuple(dict.fromkeys(sorted(bad, key=lambda row: row.source_row))),
    )
