"""Measure the speed of reading and writing rows between Parquet and tensors.

Covers decoding, collating, writing, the first training step, and a training step compared with
plain `transformers.Trainer`.

    make bench-columns      (or: python -m benchmarks.columns; --large: also 1,000,000 rows)

Classifiers: V = 5, rows of 20 tokens, batches of 32, a student of 4.4M parameters (BERT, 2 layers
of width 128; a step also of MiniLM's shape, 6 layers of width 384). Language models: `sampled`
rows of 1,024 tokens. Compared methods alternate in one process with one torch thread, and the
results are medians. Times are processor seconds, except for the first step, during which a
background thread decodes ahead. Finished parts are stored in `columns.json`, and an interrupted
run continues with the next part; --anew measures everything again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.training import make_cache as make_lm_cache
from benchmarks.training import make_tokenizer

VOCABULARY, LENGTH, CLASSES, BATCH = 30_522, 20, 5, 32
LM_CLASSES, LM_ROWS, LM_BATCH = 49_152, 24, 4
SIZES = (10_000, 100_000)
LARGE = 1_000_000
SMALL = "4.4M"
#: Student -> layers, width and heads of BERT.
SHAPES = {SMALL: (2, 128, 2), "MiniLM": (6, 384, 12)}


# ------------------------------------------------------------------------------------------- caches


def labelled_rows(count: int) -> Iterator[Any]:
    """Yield rows of random token ids, logits and labels."""
    import pipeline as softlabel

    rng = np.random.default_rng(0)
    for start in range(0, count, 10_000):
        size = min(10_000, count - start)
        ids = rng.integers(0, VOCABULARY, (size, LENGTH), dtype=np.int32)
        logits = rng.normal(size=(size, 1, CLASSES)).astype(np.float32) * 2
        labels = rng.integers(0, CLASSES, size)
        logits[np.arange(size), 0, labels] += 2
        for i in range(size):
            yield softlabel.LabelledRow(input_ids=ids[i], logits=logits[i], label=int(labels[i]))


def write(path: Path, count: int) -> Any:
    """Write a cache of `count` rows."""
    import pipeline as softlabel

    return softlabel.write_cache(
        labelled_rows(count),
        path,
        task="sequence-classification",
        tokenizer=make_tokenizer(VOCABULARY),
        encoding=softlabel.Full(),
        teacher="random logits",
        num_classes=CLASSES,
        rows_per_shard=max(1000, count // 100),
        overwrite=True,
    )


def classes_cache(folder: Path, count: int) -> Any:
    """Return the classifier cache of `count` rows, and create it if it is missing."""
    import pipeline as softlabel
    from pipeline.errors import CacheError

    path = folder / f"classes-{count}"
    try:
        return softlabel.Cache.open(path, verify="none")
    except CacheError:
        return write(path, count)


# ---------------------------------------------------------------------------------------- the parts


def seconds(work: Callable[[], Any]) -> float:
    """Return the processor seconds of `work` over all threads."""
    started = time.process_time()
    work()
    return time.process_time() - started


def medians(repeats: int, ways: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Run the methods in turn `repeats` times, and return the median result of each."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            found[name].append(way())
    return {name: statistics.median(values) for name, values in found.items()}


def measure_write(folder: Path, repeats: int) -> dict[str, float]:
    """Return the rows per second of `write_cache`."""
    count = 20_000
    return medians(repeats, {"write_cache": lambda: count / seconds(lambda: write(folder / "written", count))})


def measure_read(folder: Path, repeats: int) -> dict[str, float]:
    """Return the reading speed of one thread.

    Measures decoding, collating, and reading with PyArrow alone, in rows per second for the
    classifier and in positions per second for the language model.
    """
    classes = classes_cache(folder, SIZES[-1])
    tokens = make_lm_cache(folder, "sampled", LM_CLASSES, LM_ROWS)
    positions = sum(shard.positions for shard in tokens.manifest.shards)
    return medians(
        repeats,
        {
            "PyArrow, classifier rows": lambda: SIZES[-1] / seconds(lambda: read_alone(classes)),
            "decode, classifier rows": lambda: SIZES[-1] / batches(classes, BATCH)[0],
            "collate, classifier rows": lambda: SIZES[-1] / batches(classes, BATCH)[1],
            "PyArrow, sampled positions": lambda: positions / seconds(lambda: read_alone(tokens)),
            "decode, sampled positions": lambda: positions / batches(tokens, LM_BATCH)[0],
            "collate, sampled positions": lambda: positions / batches(tokens, LM_BATCH)[1],
        },
    )


def read_alone(cache: Any) -> None:
    """Read the same columns one row group at a time with PyArrow only."""
    import pyarrow.parquet as pq

    for shard in cache.manifest.shards:
        file = pq.ParquetFile(cache.root / "data" / f"{shard.name}.parquet", page_checksum_verification=True)
        for group in range(file.metadata.num_row_groups):
            file.read_row_group(group, use_threads=False)


def batches(cache: Any, size: int) -> tuple[float, float]:
    """Return the seconds of one epoch in training order: (decoding with the order, collating)."""
    from pipeline.softlabels import default_temperature
    from pipeline.tasks import get_task
    from pipeline.training.batches.collate import Collator, TrainingRows
    from pipeline.training.batches.order import OPEN, BatchOrder

    contract = cache.manifest.contract
    data = cache.dataset("train", window=OPEN)
    rows = TrainingRows(data)
    collator = Collator(get_task(contract.task), cache.tokenizer, default_temperature(contract.encoding, 2.0), pad_id=0)
    decoding = collating = 0.0
    started = time.process_time()
    for batch in BatchOrder(data, size, seed=0):
        picked = rows.__getitems__(batch)
        decoded = time.process_time()
        collator(picked)
        done = time.process_time()
        decoding, collating, started = decoding + decoded - started, collating + done - decoded, done
    return decoding, collating


def measure_first(folder: Path, repeats: int, sizes: tuple[int, ...]) -> dict[str, float]:
    """Return the wall-clock seconds from opening the cache to the end of the first step.

    A background thread decodes ahead during this time.
    """
    import pipeline as softlabel

    paths = {f"first step of {size:,} rows": classes_cache(folder, size).root for size in sizes}

    def first(path: Path) -> float:
        started = time.perf_counter()
        make_trainer("cache", softlabel.Cache.open(path), folder, 1).train()
        return time.perf_counter() - started

    first(next(iter(paths.values())))  # warm-up: imports and one-time setup
    return medians(repeats, {name: functools.partial(first, path) for name, path in paths.items()})


def make_trainer(way: str, cache: Any, folder: Path, steps: int, size: str = SMALL) -> Any:
    """Return a Trainer on the rows in memory, or a distillation trainer on the cache."""
    from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding, Trainer, set_seed

    import pipeline as softlabel
    from pipeline.models.arguments import show_progress, training_arguments

    set_seed(0)
    layers, width, heads = SHAPES[size]
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    config.num_labels = CLASSES
    model = BertForSequenceClassification(config)
    args = training_arguments(
        str(folder / "out"),
        {"logging_steps": 10_000},
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        learning_rate=1e-4,
    )
    trainer: Any
    if way == "plain":
        rows = [
            {"input_ids": row.example.input_ids.tolist(), "labels": row.example.label} for row in cache.dataset("train")
        ]
        trainer = Trainer(model, args, train_dataset=rows, data_collator=DataCollatorWithPadding(cache.tokenizer))
    else:
        trainer = softlabel.DistillationTrainer(model, args, cache=cache, loss=softlabel.Loss(0.5, 0.5))
    show_progress(trainer, way)
    return trainer


def measure_step(folder: Path, repeats: int, size: str) -> dict[str, float]:
    """Return the seconds of a training step with each trainer.

    The two trainers run in separate threads that alternate every 20 steps.
    """
    from transformers import TrainerCallback

    cache, ways, turn, warm = classes_cache(folder, SIZES[0]), ("plain", "cache"), 20, 5
    steps = turn * (repeats + 1)
    batons = [threading.Semaphore(int(number == 0)) for number in range(len(ways))]
    found: dict[str, list[float]] = {way: [] for way in ways}

    class Turns(TrainerCallback):
        def __init__(self, number: int) -> None:
            self.number, self.started = number, 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            batons[self.number].acquire()

        def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            done = state.global_step
            if done % turn == warm:  # past the batches that were prefetched while this thread waited
                self.started = time.process_time()
            if done % turn == 0:
                if done > turn:
                    found[ways[self.number]].append((time.process_time() - self.started) / (turn - warm))
                batons[(self.number + 1) % len(ways)].release()
                if done < steps:
                    batons[self.number].acquire()

    threads = []
    for number, way in enumerate(ways):
        trainer = make_trainer(way, cache, folder, steps, size)
        trainer.add_callback(Turns(number))
        threads.append(threading.Thread(target=trainer.train))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ratios = [one / other for one, other in zip(found["cache"], found["plain"], strict=True)]
    return {**{way: statistics.median(values) for way, values in found.items()}, "ratio": statistics.median(ratios)}


# --------------------------------------------------------------------------------------------- main


@dataclasses.dataclass(frozen=True)
class Kept:
    """Stores finished parts in a JSON file."""

    path: Path

    def part(self, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Return the stored result of a part, or measure and store it."""
        parts = json.loads(self.path.read_text()) if self.path.is_file() else {}
        if name not in parts:
            parts[name] = measure()
            self.path.write_text(json.dumps(parts, indent=1) + "\n")
        found: dict[str, float] = parts[name]
        return found


@click.command()
@click.option("--output", default="runs/bench-columns", show_default=True, help="Where caches and figures go.")
@click.option("--repeats", default=7, show_default=True, help="Turns of each way.")
@click.option("--large", is_flag=True, help="Also the first step of 1,000,000 rows.")
@click.option("--anew", is_flag=True, help="Measure again what was measured before.")
def main(output: str, repeats: int, large: bool, anew: bool) -> None:
    """Measure reading and writing rows, and training steps of a classifier from the cache."""
    import torch

    from pipeline.models.quiet import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    kept = Kept(folder / "columns.json")
    if anew:
        kept.path.unlink(missing_ok=True)
    rates = {
        **kept.part("write", lambda: measure_write(folder, min(repeats, 3))),
        **kept.part("read", lambda: measure_read(folder, repeats)),
    }
    for name, rate in rates.items():
        click.echo(f"  {name:<42}{rate:>14,.0f} a second")
    sizes = (*SIZES, LARGE) if large else SIZES
    first = kept.part("first, large" if large else "first", lambda: measure_first(folder, repeats, sizes))
    for name, spent in first.items():
        click.echo(f"  {name:<42}{spent:>14.2f} s{spent / next(iter(first.values())):>10.2f}x")
    for size in SHAPES:
        turns = 2 * repeats if size == SMALL else repeats
        step = kept.part(f"step, {size}", functools.partial(measure_step, folder, turns, size))
        for name in ("plain", "cache"):
            click.echo(f"  {f'step of {size}, {name}':<42}{1000 * step[name]:>14.1f} ms")
        click.echo(f"  {f'step of {size}, cache over plain':<42}{step['ratio']:>14.3f}x")


if __name__ == "__main__":
    main()
