"""Measure the cost of stage 1 against a bare teacher forward pass, its scaling and its memory.

    make bench-capture            (or: python -m benchmarks.capture)

Every measurement runs in its own process, so that its peak memory is its own. The methods
alternate, and the results are medians over the repeats. The time to load the teacher and to hash it
and the data set is reported separately, as `start`.

    bare      the teacher's forward pass, head included, over the same rows in the same batches
    sampled   this pipeline, from tokens to the cache, `sampled` (c = 25; classifiers: `full`)
    top-k     the same, `top-k` (k = 50, three temperatures)
    map       datasets.map, padded batches of 8 rows, log_softmax, topk(50), Python lists

Teachers: SmolLM2-135M (`lm`), MiniLM with a head of five classes (`classifier`), and a model that
is fast enough to expose the cost of the pipeline around it (`fast`: BERT, 2 layers of width 128, on
sentences). The `bare` measurement of `fast` runs its tokenizer on batches of 1,000 texts, and its
forward pass.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.training import peak_memory, reset_peak

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs/figures/capture.png"
WAYS = ("bare", "sampled", "top-k", "map")
ENGINES = ("process", "workers", "ray")
LENGTH = {"lm": 1024, "classifier": 256, "fast": 64}
TEACHER = {"lm": "data/bbc_lm/smollm2", "classifier": "data/bbc/minilm", "fast": "data/bbc/minilm"}
TOP_K = 50


# ---------------------------------------------------------------------------------- one measurement


@dataclass(frozen=True)
class Measured:
    """Result of one measurement process."""

    tokens: int
    seconds: float
    start_seconds: float
    peak_bytes: int
    """Bytes in addition to those of the loaded teacher."""


def articles(kind: str, count: int, folder: Path) -> Path:
    """Write `count` BBC articles that fit the teacher's context to a file, and return its path."""
    from transformers import AutoTokenizer

    from data.bbc.articles import load_articles, split_articles

    path = folder / f"{kind}-{count}.jsonl"
    if not path.exists():
        tokenizer = AutoTokenizer.from_pretrained(TEACHER[kind])
        texts: Iterable[str] = (article.text for article in split_articles(load_articles()).train)
        if kind == "fast":
            texts = (s for text in texts for s in re.split(r"(?<=[.!?])\s+", text) if len(s) > 20)
        fitting = (text for text in texts if kind != "lm" or len(tokenizer(text).input_ids) <= LENGTH[kind])
        path.write_text(
            "".join(json.dumps({"text": text}) + "\n" for text, _ in zip(fitting, range(count), strict=False))
        )
    return path


def teacher_of(kind: str, folder: Path) -> str:
    """Return the teacher's path or name.

    The language model is used as it is. The classifiers get a random head of five classes, which
    costs as much as a trained one.
    """
    if kind == "lm":
        return TEACHER[kind]
    path = folder / f"teacher-{kind}"
    if not path.exists():
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, set_seed

        set_seed(0)
        if kind == "fast":
            small = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
            shape = AutoConfig.from_pretrained(TEACHER[kind], num_labels=5, **small)
            model = AutoModelForSequenceClassification.from_config(shape)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(TEACHER[kind], num_labels=5)
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(TEACHER[kind]).save_pretrained(path)
    return str(path)


def config_of(kind: str, way: str, count: int, folder: Path, **settings: Any) -> Any:
    """Return the capture configuration of one method."""
    from pipeline.config import CacheLogitsConfig, DataConfig

    task = "causal-lm" if kind == "lm" else "sequence-classification"
    encoding: dict[str, Any] = {} if way != "top-k" else {"encoding": "top-k", "top_k": TOP_K if kind == "lm" else 3}
    return CacheLogitsConfig(
        task=task,  # type: ignore[arg-type]
        data=DataConfig(dataset=str(articles(kind, count, folder)), max_length=LENGTH[kind]),
        teacher=teacher_of(kind, folder),
        output=str(folder / f"cache-{time.monotonic_ns()}"),
        **{**encoding, **settings},
    )


def measure(kind: str, way: str, count: int, folder: Path) -> Measured:
    """Measure one method in this process."""
    from pipeline.capture.engines.in_process import capture
    from pipeline.capture.job import prepare
    from pipeline.models.quiet import quiet_libraries

    quiet_libraries()
    began = time.perf_counter()
    job = prepare(config_of(kind, way, count, folder))
    start = time.perf_counter() - began
    work: dict[str, Callable[[], int]] = {
        "bare": lambda: bare(job),
        "map": lambda: usual(job, articles(kind, count, folder), LENGTH[kind]),
    }
    if kind == "fast":
        texts = [json.loads(line)["text"] for line in articles(kind, count, folder).read_text().splitlines()]
        work["bare"] = lambda: bare_texts(job, texts)
    bare(job, batches=1)  # warm-up
    base = reset_peak()
    began = time.perf_counter()
    if way in work:
        tokens = work[way]()
    else:
        cache = capture(job)
        assert cache is not None
        tokens = sum(shard.tokens for shard in cache.manifest.shards)
    return Measured(tokens, time.perf_counter() - began, start, peak_memory() - base)


def bare(job: Any, batches: int | None = None) -> int:
    """Run the model's forward pass over the planned batches, and return the number of tokens."""
    import torch

    from pipeline.capture.forward import synchronize
    from pipeline.capture.plan import plan_batches
    from pipeline.capture.reading import read_shard
    from pipeline.models import pad_id

    tokens = 0
    model = job.teacher.model
    for shard in job.plan.shards:
        examples = read_shard(job, shard).examples
        planned = plan_batches([e.num_tokens for e in examples], job.plan.contract.batch_tokens)
        for members, length in planned[:batches]:
            part = [examples[i] for i in members]
            inputs, _ = job.task.collate(part, pad_id(job.tokenizer), length)
            with torch.inference_mode():
                synchronize(model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).logits)
            tokens += sum(e.num_tokens for e in part)
    return tokens


def bare_texts(job: Any, texts: list[str]) -> int:
    """Run only the tokenizer and the model's forward pass over the planned batches.

    Returns:
        The number of tokens.
    """
    import torch

    from pipeline.capture.plan import plan_batches

    model, tokenizer, ids = job.teacher.model, job.tokenizer, []
    for start in range(0, len(texts), 1000):
        part = texts[start : start + 1000]
        ids += tokenizer(part, truncation=True, max_length=LENGTH["fast"]).input_ids
    for members, _ in plan_batches([*map(len, ids)], job.plan.contract.batch_tokens):
        inputs = tokenizer.pad({"input_ids": [ids[i] for i in members]}, return_tensors="pt")
        with torch.inference_mode():
            model(**inputs.to(model.device))
    return sum(map(len, ids))


def usual(job: Any, path: Path, length: int) -> int:
    """Run a typical `datasets.map` capture, and return the number of tokens."""
    import datasets
    import torch

    model, tokenizer = job.teacher.model, job.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    k = min(TOP_K, model.config.get_text_config().vocab_size if job.task.predicts_tokens else 3)

    def label(rows: dict[str, list[str]]) -> dict[str, Any]:
        found = tokenizer(rows["text"], truncation=True, max_length=length, padding=True, return_tensors="pt").to(
            model.device
        )
        with torch.no_grad():
            top = torch.log_softmax(model(**found).logits.float(), -1).topk(k)
        return {
            "length": found["attention_mask"].sum(1).tolist(),
            "input_ids": found["input_ids"].tolist(),
            "top_ids": top.indices.tolist(),
            "top_logprobs": top.values.tolist(),
        }

    data = datasets.Dataset.from_json(str(path))
    made = data.map(label, batched=True, batch_size=8, load_from_cache_file=False)
    made.to_parquet(str(path.with_suffix(".map.parquet")))
    return sum(made["length"])


def measure_engine(engine: str, count: int, folder: Path) -> float:
    """Return tokens per second over the second half of the shards.

    Uses two workers, or one process with one thread.
    """
    import torch

    from pipeline.cache.format.manifest import Layout, load_receipt
    from pipeline.capture.run import run
    from pipeline.models.quiet import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(2 if engine == "workers" else 1)
    settings: dict[str, dict[str, Any]] = {
        "process": {},
        "workers": {"num_workers": 2},
        "ray": {"engine": "ray", "num_workers": 2},
    }
    cache = run(config_of("lm", "sampled", count, folder, rows_per_shard=1, **settings[engine]))
    assert cache is not None
    layout = Layout(cache.root)
    spans = []
    for shard in cache.manifest.shards:
        receipt = load_receipt(layout, shard.name)
        assert receipt is not None
        end = layout.receipt(shard.name).stat().st_mtime
        spans.append((end - receipt.seconds, end))
    # Only the second half of the shards counts: the first worker runs alone until the second has
    # loaded its teacher.
    spans.sort(key=lambda span: span[1])
    late = spans[len(spans) // 2 :]
    tokens = {shard.name: shard.tokens for shard in cache.manifest.shards}
    ends = {layout.receipt(name).stat().st_mtime: tokens[name] for name in tokens}
    first = spans[len(spans) // 2 - 1][1]
    return sum(ends[end] for _, end in late) / (late[-1][1] - first)


def measure_rows(count: int, folder: Path) -> Measured:
    """Capture `count` rows with a classifier so small that the pipeline's own cost dominates."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, set_seed

    from pipeline.capture.engines.in_process import capture
    from pipeline.capture.job import prepare
    from pipeline.config import CacheLogitsConfig, DataConfig
    from pipeline.models.quiet import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(2)
    teacher = folder / "tiny"
    if not teacher.exists():
        set_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(TEACHER["classifier"])
        shape: Any = {
            "vocab_size": len(tokenizer),
            "num_labels": 5,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        }
        BertForSequenceClassification(BertConfig(**shape)).save_pretrained(teacher)
        tokenizer.save_pretrained(teacher)
    path = folder / f"rows-{count}.jsonl"
    texts = [json.loads(line)["text"] for line in articles("classifier", 500, folder).read_text().splitlines()]
    with path.open("w") as handle:
        for i in range(count):
            handle.write(json.dumps({"text": f"{i} {texts[i % len(texts)]}"}) + "\n")
    config = CacheLogitsConfig(
        task="sequence-classification",
        data=DataConfig(dataset=str(path), max_length=64),
        teacher=str(teacher),
        output=str(folder / f"cache-rows-{count}"),
        rows_per_shard=1000,
    )
    began = time.perf_counter()
    job = prepare(config)
    start = time.perf_counter() - began
    base = reset_peak()
    began = time.perf_counter()
    cache = capture(job)
    assert cache is not None
    return Measured(
        sum(s.tokens for s in cache.manifest.shards), time.perf_counter() - began, start, peak_memory() - base
    )


# --------------------------------------------------------------------------------- all measurements


def in_process(what: list[str], folder: Path) -> Any:
    """Run one measurement in a new process."""
    command = [sys.executable, "-m", "benchmarks.capture", "--folder", str(folder), "--measure", *what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(what)}: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(kind: str, count: int, repeats: int, folder: Path) -> None:
    """Print the results of one teacher as a table."""
    found: dict[str, list[Measured]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            found[way].append(Measured(**in_process([kind, way, str(count)], folder)))
    speed = {way: statistics.median(m.tokens / m.seconds for m in runs) for way, runs in found.items()}
    spread = {way: [m.tokens / m.seconds / speed[way] for m in runs] for way, runs in found.items()}
    click.echo(f"{kind}: {found['bare'][0].tokens:,} tokens in {count} rows, {repeats} repeats")
    click.echo(f"  {'way':8} {'tokens/s':>9} {'of bare':>8} {'of map':>7} {'spread':>14} {'peak MB':>8} {'start s':>8}")
    for way, runs in found.items():
        peak, start = (statistics.median(getattr(m, name) for m in runs) for name in ("peak_bytes", "start_seconds"))
        span = f"{min(spread[way]):.2f} to {max(spread[way]):.2f}"
        click.echo(
            f"  {way:8} {speed[way]:9,.0f} {speed[way] / speed['bare']:7.2f}x {speed[way] / speed['map']:6.2f}x {span:>14} {peak / 1e6:8,.0f} {start:8.1f}"
        )


def grow(sizes: list[int], folder: Path) -> None:
    """Plot memory and time against the number of rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [Measured(**in_process(["rows", "sampled", str(size)], folder)) for size in sizes]
    click.echo("rows, classifier of 1 layer, shards of 1,000 rows")
    for size, m in zip(sizes, found, strict=True):
        click.echo(f"  {size:7,} rows {m.seconds:7.1f} s {m.peak_bytes / 1e6:6,.0f} MB above the loaded teacher")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.plot(sizes, [m.seconds for m in found], "o-")
    left.set(xlabel="rows", ylabel="seconds", title="time", ylim=(0, None), xlim=(0, None))
    right.plot(sizes, [m.peak_bytes / 1e6 for m in found], "o-")
    right.set(xlabel="rows", ylabel="peak MB above the loaded teacher", title="memory", ylim=(0, None), xlim=(0, None))
    figure.savefig(PICTURE, dpi=80)


@click.command()
@click.option("--rows", default=40, show_default=True, help="Articles for the language model.")
@click.option("--classifier-rows", default=400, show_default=True, help="Articles for the classifier.")
@click.option("--sentences", default=24_000, show_default=True, help="For the fast classifier.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--only", type=click.Choice(["lm", "classifier", "fast", "engines", "rows"]), multiple=True)
@click.option("--folder", type=click.Path(path_type=Path), default=None, hidden=True)
@click.option("--measure", "what", type=(str, str, int), default=None, hidden=True)
def main(
    rows: int,
    classifier_rows: int,
    sentences: int,
    repeats: int,
    only: tuple[str, ...],
    folder: Path | None,
    what: tuple[str, str, int] | None,
) -> None:
    """Measure the speed, scaling and memory of stage 1.

    Example: python -m benchmarks.capture --only lm
    """
    if what is not None:
        assert folder is not None
        kind, way, count = what
        if kind == "engine":
            click.echo(json.dumps(measure_engine(way, count, folder)))
            return
        found = measure_rows(count, folder) if kind == "rows" else measure(kind, way, count, folder)
        click.echo(json.dumps({name: getattr(found, name) for name in Measured.__dataclass_fields__}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if not only or "lm" in only:
            compare("lm", rows, repeats, folder)
        if not only or "classifier" in only:
            compare("classifier", classifier_rows, repeats, folder)
        if not only or "fast" in only:
            compare("fast", sentences, repeats, folder)
        if not only or "engines" in only:
            speeds = {
                e: statistics.median(in_process(["engine", e, str(rows)], folder) for _ in range(repeats))
                for e in ENGINES
            }
            click.echo("engines, language model, one thread a worker")
            for engine, speed in speeds.items():
                click.echo(f"  {engine:8} {speed:7,.0f} tokens/s {speed / speeds['process']:5.2f}x")
        if not only or "rows" in only:
            grow([2_000, 6_000, 20_000], folder)


if __name__ == "__main__":
    main()
