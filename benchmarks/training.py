"""Compare the time and peak memory of a distillation step with plain cross-entropy.

    make bench-training            (or: python -m benchmarks.training)

Every method runs in its own process, so that its peak memory is its own. The processes of one
comparison alternate, and the result is the median over all their steps. Students have random
weights, and caches have random logits about as peaked as a real teacher's; neither affects the cost
of a step. The teacher in the loop has the shape of SmolLM2-135M.

    plain      transformers.Trainer, next-token cross-entropy, dense logits
    fused-ce   this project's fused cross-entropy, soft weight 0
    sampled    distillation from a `sampled` cache (c = 25), hard and soft loss
    top-k      distillation from a `top-k` cache (k = 50, ghost), hard and soft loss
    dense      common offline distillation: top-k scattered to (N, V), log_softmax, kl_div
    online     the teacher in the loop, KL over dense logits
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

WAYS = ("plain", "fused-ce", "sampled", "top-k", "dense", "online")
LENGTH = 1024
#: (layers, width, heads).
STUDENTS = {"16M": (4, 256, 4), "52M": (9, 512, 8)}
TEACHER = (30, 576, 9)


# ---------------------------------------------------------------------------------- one measurement


def make_model(shape: tuple[int, int, int], classes: int) -> Any:
    """Return a randomly initialised Llama of this shape with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    layers, width, heads = shape
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=classes,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 3),
            intermediate_size=width * 8 // 3,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )


def make_cache(folder: Path, way: str, classes: int, rows: int) -> Any:
    """Return a cache of random token ids and logits."""
    import torch

    import pipeline as softlabel
    from pipeline.errors import CacheError

    name = "top-k" if way in ("top-k", "dense") else "sampled"
    path = folder / f"cache-{name}-{classes}-{rows}"
    try:
        return softlabel.Cache.open(path)
    except CacheError:
        pass
    generator = torch.Generator().manual_seed(0)

    def each() -> Iterator[softlabel.LabelledRow]:
        for _ in range(rows):
            ids = torch.randint(0, classes, (LENGTH,), generator=generator)
            logits = torch.randn(LENGTH - 1, classes, generator=generator) * 3.2
            yield softlabel.LabelledRow(input_ids=ids.tolist(), logits=logits)

    encoding = softlabel.TopK(50, (1.0,)) if name == "top-k" else softlabel.Sampled(25.0)
    return softlabel.write_cache(
        each(), path, task="causal-lm", tokenizer=make_tokenizer(classes), encoding=encoding, teacher="random logits"
    )


def make_tokenizer(classes: int) -> Any:
    """Return a tokenizer of `classes` words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(classes)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", eos_token="w1", model_max_length=LENGTH)


def measure(way: str, student: str, classes: int, rows: int, steps: int, folder: Path) -> dict[str, float]:
    """Measure the seconds of each step but the first, and peak memory above the loaded model."""
    import torch
    from transformers import TrainerCallback

    from pipeline.models.quiet import quiet_libraries

    quiet_libraries()
    cache = make_cache(folder, way, classes, rows * (steps + 1))
    trainer = make_trainer(way, make_model(STUDENTS[student], classes), cache, classes, rows, steps, folder)
    cuda = torch.cuda.is_available()
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    trainer.add_callback(Clock())
    base = torch.cuda.memory_allocated() if cuda else reset_peak()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if cuda else peak_memory()
    times = [after - before for before, after in itertools.pairwise(marks)]
    return {"seconds": times, "bytes": peak - base}  # type: ignore[dict-item]


def make_trainer(way: str, model: Any, cache: Any, classes: int, rows: int, steps: int, folder: Path) -> Any:
    """Return the Trainer of one method."""
    import torch
    from transformers import Trainer

    import pipeline as softlabel
    from pipeline.models.arguments import show_progress, training_arguments
    from pipeline.training.batches.collate import from_tensors

    args = training_arguments(
        str(folder / "out"),
        {"logging_steps": 1000},
        max_steps=steps + 1,
        per_device_train_batch_size=rows,
        save_strategy="no",
        learning_rate=1e-4,
    )
    trainer: Any
    if way == "plain":

        def collate(batch: list[Any]) -> dict[str, Any]:
            ids = torch.stack([torch.from_numpy(row.example.input_ids).long() for row in batch])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

        trainer = Trainer(model=model, args=args, data_collator=collate, train_dataset=cache.dataset("train"))
    elif way in ("fused-ce", "sampled", "top-k"):
        loss = softlabel.Loss(1.0, 0.0) if way == "fused-ce" else softlabel.Loss(0.5, 0.5, temperature=1.0)
        trainer = softlabel.DistillationTrainer(model, args, cache=cache, loss=loss)
    else:
        teacher = make_model(TEACHER, classes).eval().to(args.device) if way == "online" else None

        class Dense(softlabel.DistillationTrainer):
            """Computes both losses over dense logits.

            The teacher's distribution is scattered to (N, V), or computed by the teacher.
            """

            def compute_loss(
                self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
            ) -> Any:
                batch = from_tensors(inputs, classes)
                logits = model(**batch.inputs, use_cache=False).logits[batch.supervised].float()
                if teacher is None:
                    goal = batch.target
                    owner = torch.repeat_interleave(torch.arange(len(goal), device=logits.device), goal.offsets.diff())
                    wanted = torch.zeros_like(logits)
                    wanted[owner, goal.ids] = goal.weights
                else:
                    with torch.no_grad():
                        wanted = torch.softmax(
                            teacher(**batch.inputs, use_cache=False).logits[batch.supervised].float(), -1
                        )
                soft = torch.nn.functional.kl_div(torch.log_softmax(logits, -1), wanted, reduction="batchmean")
                return 0.5 * soft + 0.5 * torch.nn.functional.cross_entropy(logits, batch.labels)

        trainer = Dense(model, args, cache=cache, loss=softlabel.Loss(0.5, 0.5, temperature=1.0))
    show_progress(trainer, way)
    return trainer


def reset_peak() -> int:
    """Reset the peak memory of this process (Linux), and return its resident bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_memory() -> int:
    """Return the peak resident bytes since `reset_peak`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def measure_reader(classes: int, rows: int, folder: Path) -> dict[str, float]:
    """Return the positions per second that one thread decodes and collates for the student."""
    import torch

    from pipeline.training.batches.collate import Collator, TrainingRows
    from pipeline.training.batches.order import OPEN, BatchOrder

    torch.set_num_threads(1)
    cache = make_cache(folder, "sampled", classes, rows)
    from pipeline.tasks import get_task

    data = cache.dataset("train", window=OPEN)
    collator = Collator(get_task("causal-lm"), cache.tokenizer, 1.0)
    rates = []
    for _ in range(5):
        started = time.perf_counter()
        positions = sum(
            len(collator(TrainingRows(data).__getitems__(batch))["labels"]) for batch in BatchOrder(data, 4, seed=0)
        )
        rates.append(positions / (time.perf_counter() - started))
    kept = statistics.fmean(len(row.soft.top_ids) + len(row.soft.tail_ids) for row in data) / (LENGTH - 1)
    return {"positions_per_second": statistics.median(rates), "kept": kept}


# ----------------------------------------------------------------------------------- the comparison


class Runs:
    """Runs measurements in alternating processes, and prints their table."""

    def __init__(self, folder: Path, repeats: int, steps: int) -> None:
        self.folder, self.repeats, self.steps = folder, repeats, steps
        self.results: list[dict[str, Any]] = []

    def compare(
        self, title: str, ways: list[tuple[str, str, int, int]]
    ) -> dict[tuple[str, str, int, int], tuple[float, float]]:
        """Print ratios, and return median seconds and peak bytes.

        Returns:
            (way, student, V, rows) -> (median seconds of a step, peak bytes).
        """
        found: dict[tuple[str, str, int, int], dict[str, list[float]]] = {
            way: {"seconds": [], "bytes": []} for way in ways
        }
        for _repeat in range(self.repeats):
            for way in ways:
                steps = 1 if way[0] == "online" else self.steps  # too slow for more, and far from any target
                result = self._run("--measure", *map(str, way), str(steps))
                found[way]["seconds"] += result["seconds"]
                found[way]["bytes"].append(result["bytes"])
        medians = {way: (statistics.median(f["seconds"]), statistics.median(f["bytes"])) for way, f in found.items()}
        click.echo(f"\n{title}")
        click.echo(f"  {'':<28}{'s a step':>10}{'time':>8}{'peak MB':>10}{'memory':>8}")
        for way, (seconds, peak) in medians.items():
            base = medians[next(w for w in medians if w[1:] == way[1:])]
            name = f"{way[0]}, {way[1]}, V = {way[2]}, {way[3] * LENGTH}"
            click.echo(
                f"  {name:<28}{seconds:>10.2f}{seconds / base[0]:>7.2f}x{peak / 1e6:>10.0f}{peak / base[1]:>7.2f}x"
            )
            self.results.append({"title": title, "way": way, "seconds": seconds, "bytes": peak, "all": found[way]})
        (self.folder / "training.json").write_text(json.dumps(self.results, indent=1) + "\n")
        return medians

    def _run(self, *arguments: str) -> Any:
        command = [sys.executable, "-m", "benchmarks.training", "--output", str(self.folder), *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    def reader(self, classes: int) -> dict[str, float]:
        """Run `measure_reader` in a new process."""
        found: dict[str, float] = self._run("--reader", str(classes))
        return found


@click.command()
@click.option("--output", default="runs/bench-training", show_default=True, help="Where caches and figures go.")
@click.option("--repeats", default=3, show_default=True, help="Processes of each way.")
@click.option("--steps", default=4, show_default=True, help="Steps that count, in each process.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(["main", "large", "classes", "positions"]),
    help="A part of it; repeatable.",
)
@click.option("--measure", nargs=5, type=str, hidden=True)
@click.option("--reader", type=int, hidden=True)
def main(
    output: str, repeats: int, steps: int, only: tuple[str, ...], measure: tuple[str, ...] | None, reader: int | None
) -> None:
    """Measure the time and memory of a training step, compared with plain cross-entropy."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    if measure:
        way, student, classes, rows, count = measure
        click.echo(json.dumps(globals()["measure"](way, student, int(classes), int(rows), int(count), folder)))
        return
    if reader is not None:
        click.echo(json.dumps(measure_reader(reader, 20, folder)))
        return
    runs = Runs(folder, repeats, steps)
    if not only or "main" in only:
        medians = runs.compare(
            "A 16M student, V = 49,152, 4,096 positions a batch", [(way, "16M", 49152, 4) for way in WAYS]
        )
        read = runs.reader(49152)
        rate = 4 * (LENGTH - 1) / medians["sampled", "16M", 49152, 4][0]
        click.echo(
            f"  reader: {read['positions_per_second']:,.0f} positions a second on one core ({read['kept']:.1f} classes each), {read['positions_per_second'] / rate:.0f}x the training rate"
        )
    if not only or "large" in only:
        runs.compare("A 52M student", [(way, "52M", 49152, 4) for way in ("plain", "sampled", "top-k")])
    if not only or "classes" in only:
        sizes = (32768, 65536, 131072, 262144)
        runs.compare("By V, 1,024 positions", [(way, "16M", size, 1) for size in sizes for way in ("plain", "sampled")])
    if not only or "positions" in only:
        runs.compare("By positions", [(way, "16M", 49152, rows) for rows in (1, 2, 8) for way in ("plain", "sampled")])


if __name__ == "__main__":
    main()
