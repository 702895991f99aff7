"""Measure the speed of `softlabel verify` in megabytes per second and core, full and `--quick`.

make bench-verify            (or: python -m benchmarks.verifying)
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import click


@click.command()
@click.option("--megabytes", default=200, help="Size of the cache.")
def main(megabytes: int) -> None:
    """Verify a `sampled` cache (V = 49,152, c = 25) that consists of copies of one shard."""
    import dataclasses
    import shutil

    from benchmarks.training import make_cache
    from pipeline.cache import verify
    from pipeline.cache.format.manifest import Layout, Plan, load_receipt, parse
    from pipeline.cache.writing.build import begin, finish, record
    from pipeline.models.quiet import quiet_libraries
    from pipeline.records import ShardPlan

    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="verifying-") as folder:
        small = make_cache(Path(folder), "sampled", 49_152, 40)
        shard = small.manifest.shards[0]
        source = Layout(small.root)
        receipt = load_receipt(source, shard.name)
        assert receipt is not None
        count = -(-megabytes * 1_000_000 // shard.bytes)
        plans = tuple(ShardPlan(f"train-{i:05d}", "train", 0, shard.rows) for i in range(count))
        plan = Plan(parse(Plan, source.plan).contract, plans)
        plan = dataclasses.replace(plan, contract=small.manifest.contract)
        layout = begin(Path(folder) / "cache", plan, small.tokenizer)
        for part in plans:
            shutil.copy(source.shard(shard.name), layout.shard(part.name))
            copied = dataclasses.replace(shard, name=part.name)
            record(layout, dataclasses.replace(receipt, shard=copied, plan=part))
        finish(layout, plan)
        size = sum(copied.bytes for copied in [shard] * count) / 1e6
        for quick in (False, True):
            cpu, wall = time.process_time(), time.perf_counter()
            problems = verify(layout.root, quick=quick).problems
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            assert not problems, problems
            click.echo(
                f"{'quick' if quick else 'full':<6}{size:>8.0f} MB {wall:>7.2f} s on {len(os.sched_getaffinity(0))} cores, {cpu:>6.2f} s of processors: {size / cpu:>7.1f} MB a second and core"
            )


if __name__ == "__main__":
    main()
