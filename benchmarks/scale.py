"""Measure how the time and memory of each operation grow with the rows and shards of a cache.

    make bench-scale              (or: python -m benchmarks.scale)

A classifier's cache (V = 5, rows of 12 tokens, a random teacher of 1 layer) has 1,000 to 1,000,000
rows in 10 to 100 shards, or 100,000 rows in 10 to 5,000 shards. Every measurement runs in its own
process, so that its peak memory is its own. Seconds are wall-clock time; megabytes are in addition
to the process with its imports. `of linear` is the growth from one size to the next divided by the
growth of an operation with proportional cost: 1 is linear, below 1 is sublinear. It is omitted if
an operation is too short at both sizes. Finished measurements are stored in `scale.json`, and an
interrupted run continues with the rest.

    open           Cache.open, as in every command
    verify         softlabel verify --quick
    first step     from opening the cache to the first batch of training
    order          the row numbers of a whole epoch
    resume epoch   from opening the cache to the batch after half an epoch
    resume         cache-logits on a cache whose last shard is missing
    append         cache-logits --append of 1,000 more rows
    merge          with another cache of 1,000 rows
    filter         half of the rows, by a condition
    manifest       its size in bytes (no time)
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.training import make_tokenizer, peak_memory, reset_peak

ROOT = Path(__file__).parents[1]
#: (rows, shards) of the caches in each table.
BY_ROWS = ((1_000, 10), (10_000, 10), (100_000, 10), (1_000_000, 100))
BY_SHARDS = ((100_000, 10), (100_000, 100), (100_000, 1_000), (100_000, 5_000))
WORDS, VOCABULARY, CLASSES, MORE, BATCH = 12, 1_000, 5, 1_000, 32
#: Growth below these seconds and megabytes is ignored as noise.
_LEAST_SECONDS, _LEAST_MB = 0.3, 20.0


# ------------------------------------------------------------------------------------------- caches


def data_of(folder: Path, rows: int, start: int = 0) -> Path:
    """Write random texts as JSON lines; larger files start with the rows of smaller ones."""
    path = folder / f"data-{start}-{rows}" / "rows.jsonl"
    if not path.is_file():
        path.parent.mkdir()
        rng = np.random.default_rng(start)
        with path.open("w") as handle:
            for _ in range(rows):
                words = " ".join(f"w{word}" for word in rng.integers(2, VOCABULARY, WORDS).tolist())
                handle.write(json.dumps({"text": words, "label": int(rng.integers(CLASSES))}) + "\n")
    return path


def teacher_of(folder: Path) -> str:
    """Return the path of a random BERT of 1 layer and width 32."""
    path = folder / "teacher"
    if not path.is_dir():
        from tokenizers.pre_tokenizers import WhitespaceSplit
        from transformers import BertConfig, BertForSequenceClassification, set_seed

        set_seed(0)
        shape: dict[str, Any] = {
            "num_labels": CLASSES,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        config = BertConfig(vocab_size=VOCABULARY, intermediate_size=64, **shape)
        BertForSequenceClassification(config).save_pretrained(path)
        tokenizer = make_tokenizer(VOCABULARY)
        tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
        tokenizer.save_pretrained(path)
    return str(path)


def config_of(folder: Path, data: Path, output: Path, rows_per_shard: int, **settings: Any) -> Any:
    """Return the capture configuration of one data file."""
    from pipeline.config import CacheLogitsConfig, DataConfig

    return CacheLogitsConfig(
        task="sequence-classification",
        data=DataConfig(dataset=str(data), max_length=32, label_map=tuple(f"{i}=LABEL_{i}" for i in range(CLASSES))),
        teacher=teacher_of(folder),
        output=str(output),
        rows_per_shard=rows_per_shard,
        **settings,
    )


def cache_of(folder: Path, rows: int, shards: int) -> Path:
    """Return the cache of `rows` rows in `shards` shards, and create it if it is missing."""
    path = folder / f"cache-{rows}-{shards}"
    if not (path / "manifest.json").is_file():
        from pipeline.capture.run import run

        run(config_of(folder, data_of(folder, rows), path, rows // shards))
    return path


def small_cache(folder: Path) -> Path:
    """Return a cache of 1,000 other rows."""
    path = folder / "cache-small"
    if not (path / "manifest.json").is_file():
        from pipeline.capture.run import run

        run(config_of(folder, data_of(folder, MORE, start=1), path, MORE))
    return path


# -------------------------------------------------------------------------------------------- steps


def open_cache(path: Path) -> None:
    """Open the cache as every command does."""
    import pipeline as softlabel

    softlabel.Cache.open(path)


def verify_quick(path: Path) -> None:
    """Run `softlabel verify --quick`."""
    from pipeline.cache import verify

    assert not verify(path, quick=True).problems


def _order(cache: Any) -> Any:
    from pipeline.training.batches.order import OPEN, BatchOrder

    return BatchOrder(cache.dataset("train", window=OPEN), BATCH, seed=0)


def _batch(path: Path, epochs: float) -> None:
    import pipeline as softlabel
    from pipeline.softlabels import default_temperature
    from pipeline.tasks import get_task
    from pipeline.training.batches.collate import Collator, TrainingRows

    cache = softlabel.Cache.open(path)
    order = _order(cache)
    skipped = int(epochs * len(order))
    contract = cache.manifest.contract
    collate = Collator(get_task(contract.task), cache.tokenizer, default_temperature(contract.encoding, 2.0), pad_id=0)
    batch = next(batch for number, batch in enumerate(order) if number == skipped)
    collate(TrainingRows(order.dataset).__getitems__(batch))


def first_step(path: Path) -> None:
    """Open the cache and read the first batch."""
    _batch(path, 0)


def resume_epoch(path: Path) -> None:
    """Open the cache and read the batch after half an epoch."""
    _batch(path, 0.5)


def epoch_order(path: Path) -> None:
    """Compute the row numbers of every batch of an epoch."""
    import pipeline as softlabel

    for _ in _order(softlabel.Cache.open(path)):
        pass


def _copy(path: Path) -> Path:
    """Copy the cache to a sibling directory, for steps that change it."""
    copy = path.with_name(f"{path.name}-copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path, copy, copy_function=shutil.copyfile)
    return copy


def _size(path: Path) -> tuple[int, int]:
    _, rows, shards = path.name.removesuffix("-copy").split("-")
    return int(rows), int(shards)


def resume_capture(path: Path) -> None:
    """Capture the last shard, which is missing."""
    from pipeline.capture.run import run

    rows, shards = _size(path)
    assert run(config_of(path.parent, data_of(path.parent, rows), path, rows // shards)) is not None


def without_last(path: Path) -> Path:
    """Return a copy of the cache without its last shard."""
    copy = _copy(path)
    last = max(copy.glob("data/*.parquet"))
    for each in (last, copy / "receipts" / f"{last.stem}.json", copy / "manifest.json"):
        each.unlink()
    return copy


def append(path: Path) -> None:
    """Append 1,000 rows."""
    from pipeline.capture.run import run

    rows, shards = _size(path)
    assert run(config_of(path.parent, longer(path), path, rows // shards, append=True)) is not None


def longer(path: Path) -> Path:
    """Write a data file with the rows of a cache and 1,000 others."""
    rows, _ = _size(path)
    both = path.parent / f"longer-{rows}" / "rows.jsonl"  # the contract includes the file's name
    if not both.is_file():
        both.parent.mkdir()
        parts = data_of(path.parent, rows), data_of(path.parent, MORE, start=2)
        both.write_text("".join(part.read_text() for part in parts))
    return both


def for_append(path: Path) -> Path:
    """Return a copy of the cache, and write the data to append."""
    copy = _copy(path)
    longer(copy)
    return copy


def no_output(path: Path) -> Path:
    """Return the cache unchanged, and remove the output of an earlier run."""
    shutil.rmtree(path.parent / "made", ignore_errors=True)
    return path


def merge(path: Path) -> None:
    """Merge the cache with a small one."""
    from pipeline.cache.transforms.merge import merge

    merge([path, small_cache(path.parent)], path.parent / "made")


def filter_half(path: Path) -> None:
    """Filter the cache by a condition on the source row."""
    from pipeline.cache.transforms.filter import filter_rows

    filter_rows(path, path.parent / "made", where="source_row % 2 = 0")


#: Name -> (preparation, which is not measured; step).
STEPS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], None]]] = {
    "open": (Path, open_cache),
    "verify": (Path, verify_quick),
    "first step": (Path, first_step),
    "order": (Path, epoch_order),
    "resume epoch": (Path, resume_epoch),
    "resume": (without_last, resume_capture),
    "append": (for_append, append),
    "merge": (no_output, merge),
    "filter": (no_output, filter_half),
}


def measure(step: str, path: Path) -> dict[str, float]:
    """Measure one step in this process.

    The step first runs on the smallest cache, as a warm-up for imports and one-time setup.
    """
    from pipeline.models.quiet import quiet_libraries

    quiet_libraries()
    small_cache(path.parent)
    ready, work = STEPS[step]
    work(ready(cache_of(path.parent, *BY_ROWS[0])))
    at = ready(path)
    base, started = reset_peak(), time.perf_counter()
    work(at)
    return {"seconds": time.perf_counter() - started, "mb": max(0, peak_memory() - base) / 1e6}


# --------------------------------------------------------------------------------------------- main


def in_process(step: str, path: Path) -> dict[str, float]:
    """Run one measurement in a new process."""
    command = [sys.executable, "-m", "benchmarks.scale", "--output", str(path.parent), "--measure", step, path.name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{step}, {path.name}: {done.stderr.strip()}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def of_linear(sizes: list[int], values: list[float], least: float) -> Iterator[float | None]:
    """Yield the growth from each size to the next, divided by the growth of the size.

    Yields None if the value is too small for a comparison.
    """
    for i in range(1, len(sizes)):
        told = values[i] >= least
        yield values[i] / max(values[i - 1], least) / (sizes[i] / sizes[i - 1]) if told else None


def show(title: str, sizes: list[int], found: dict[str, list[dict[str, float]]]) -> None:
    """Print one table."""
    click.echo(title)
    click.echo(f"  {'':14}{'':8}" + "".join(f"{size:>12,}" for size in sizes) + "   of linear, worst")
    for step, values in found.items():
        for unit, least, form in (("seconds", _LEAST_SECONDS, ".2f"), ("mb", _LEAST_MB, ",.0f")):
            if unit not in values[0]:
                continue
            row = [value[unit] for value in values]
            growth = [each for each in of_linear(sizes, row, least) if each is not None]
            worst = f"{max(growth):.2f}" if growth else "-"
            if "seconds" not in values[0]:
                name, shown, form = step, "MB", ".3f"
            else:
                name, shown = (step, "s") if unit == "seconds" else ("", "MB")
            click.echo(f"  {name:14}{shown:8}" + "".join(f"{each:>12{form}}" for each in row) + f"{worst:>20}")


@click.command()
@click.option("--output", default="runs/bench-scale", show_default=True, help="Where caches and figures go.")
@click.option("--most-rows", default=1_000_000, show_default=True, help="Leave out larger caches.")
@click.option("--anew", is_flag=True, help="Measure again what was measured before.")
@click.option("--measure", "what", type=(str, str), default=None, hidden=True)
def main(output: str, most_rows: int, anew: bool, what: tuple[str, str] | None) -> None:
    """Measure the time and memory of each step against the number of rows and shards."""
    folder = Path(output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if what is not None:
        step, name = what
        click.echo(json.dumps(measure(step, folder / name)))
        return
    kept = folder / "scale.json"
    if anew:
        kept.unlink(missing_ok=True)
    parts = json.loads(kept.read_text()) if kept.is_file() else {}
    for title, every in (("by rows", BY_ROWS), ("by shards, 100,000 rows", BY_SHARDS)):
        sizes = [size for size in every if size[0] <= most_rows]
        if len(sizes) < 2:
            continue
        found: dict[str, list[dict[str, float]]] = {step: [] for step in (*STEPS, "manifest")}
        for rows, shards in sizes:
            path = cache_of(folder, rows, shards)
            for step in STEPS:
                name = f"{step}, {path.name}"
                if name not in parts:
                    parts[name] = in_process(step, path)
                    kept.write_text(json.dumps(parts, indent=1) + "\n")
                found[step].append(parts[name])
            found["manifest"].append({"mb": (path / "manifest.json").stat().st_size / 1e6})
        show(title, [size[title != "by rows"] for size in sizes], found)


if __name__ == "__main__":
    main()
