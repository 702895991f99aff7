"""Measure bytes, noise and bias of each soft-label encoding, and the students trained on it.

    make bench-encodings            (or: python -m benchmarks.encodings)

The teacher is SmolLM2-135M-Instruct, and the text is BBC news (`make demo-lm` prepares both).

The curve covers at least 4,096 positions, with all methods on the same logits. Noise and bias are
those of `pipeline.softlabels.fidelity`, as a share of the noise of one label drawn from the
teacher. Bytes are those of the soft-label columns in this project's Parquet files; draws with
replacement count 3 bytes per class, as published for them (Anshumann et al., 2025).

Training uses 6 of the teacher's 30 layers and soft labels alone (`hard`: the text alone) with
several seeds. Students are evaluated on held-out articles against the teacher's full distribution.
The closed share of the gap is (loss of `hard` - loss) / (loss of `hard` - loss of `full`), computed
for each seed.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import pipeline as softlabel
from pipeline.cache.format.codec import pack
from pipeline.cache.format.rows import block_of
from pipeline.cache.format.schema import parquet_settings, soft_columns
from pipeline.capture.forward import output_matrix, teacher_logits
from pipeline.capture.plan import plan_batches
from pipeline.capture.shard import encode_rows
from pipeline.models import LoadedModel, load_model
from pipeline.models.arguments import show_progress, training_arguments
from pipeline.records import (
    CachedExample,
    Columns,
    Encoding,
    Fidelity,
    Sampled,
    SoftLabels,
    Target,
    Tokenization,
    TokenizedExample,
    TopK,
    TopP,
)
from pipeline.softlabels import concatenate, split_rows, target
from pipeline.softlabels.fidelity import FidelityMeter, Projection, Reference
from pipeline.sources import from_datasets, read_examples
from pipeline.tasks import get_task

DATA = Path("data/bbc_lm")
SAMPLE_SIZES = (6.0, 8.0, 12.0, 17.0, 18.0, 25.0, 35.0, 50.0, 54.0, 100.0)
DRAWS = (50, 100, 200)
LAYERS = (0, 1, 2, 27, 28, 29)
LENGTH = 256
ARTICLES = {"train": 32, "test": 6}

# ---------------------------------------------------------------------------------------- the curve


def measure_curve(folder: Path, positions: int) -> list[dict[str, Any]]:
    """Measure every encoding on the same logits, and return one table row for each."""
    teacher = load_model(get_task("causal-lm"), str(DATA / "smollm2"))
    examples = list(itertools.islice(_rows(teacher, 512), -(-positions // 511)))
    ways: list[tuple[str, Encoding, str]] = [(f"sampled c = {c:g}", Sampled(c), "") for c in SAMPLE_SIZES]
    for k in (12, 50, 128):
        ways += [(f"top-{k}, {name}", TopK(k, (1.0,)), tail) for name, tail in TAILS.items()]
    ways += [(f"top-p {p:g}, ghost", TopP(p, (1.0,)), "ghost") for p in (0.9, 0.98)]
    meters = {name: FidelityMeter() for name, _, _ in ways} | {f"{n} draws": FidelityMeter() for n in DRAWS}
    kept: dict[Encoding, list[tuple[int, SoftLabels]]] = {}
    matrix = output_matrix(teacher.model, len(teacher.tokenizer))
    assert matrix is not None
    projection = Projection.of(matrix)
    generator = torch.Generator().manual_seed(0)
    for members, width in plan_batches([e.num_tokens for e in examples], 2048):
        part = [examples[i] for i in members]
        logits = teacher_logits(get_task("causal-lm"), teacher, teacher.tokenizer, part, len(teacher.tokenizer), width)
        for encoding in dict.fromkeys(encoding for _, encoding, _ in ways):
            soft, _ = encode_rows(get_task("causal-lm"), part, logits, encoding, split="train", seed=0)
            made = split_rows(soft, [example.num_positions for example in part])
            kept.setdefault(encoding, []).extend(zip(members, made, strict=True))
        for start in range(0, len(logits), 256):
            reference = Reference.of(logits[start : start + 256], projection, seed=start)
            for name, encoding, tail in ways:
                soft = _cut(concatenate([row for _, row in kept[encoding][-len(part) :]]), start, start + 256)
                meters[name].add(reference, target(soft, 1.0, tail=tail or "ghost"), soft)
            for n in DRAWS:
                meters[f"{n} draws"].add(reference, drawn(reference.logprobs.exp(), n, generator))
    count = sum(e.num_positions for e in examples)
    lines = []
    for name, encoding, _ in ways:
        rows = [row for _, row in sorted(kept[encoding], key=lambda pair: pair[0])]
        size, entropy = soft_bytes(rows, encoding, len(teacher.tokenizer))
        lines.append(_line(name, meters[name].result(), size / count, entropy / count))
    for n in DRAWS:
        found = meters[f"{n} draws"].result()
        lines.append(_line(f"{n} draws with replacement", found, 3 * found.kept if found else 0.0, None))
    (folder / "curve.json").write_text(json.dumps(lines, indent=1) + "\n")
    return lines


TAILS = {"ghost": "ghost", "renormalised": "renormalize", "zeroed": "ignore"}


def drawn(q: Tensor, count: int, generator: torch.Generator) -> Target:
    """Draw classes with replacement at each position.

    Args:
        q: (n, V) probabilities.
        count: draws per position, each of weight 1 / count.
    """
    ids = torch.multinomial(q, count, replacement=True, generator=generator)
    weights = torch.zeros_like(q).scatter_add_(1, ids, torch.full(ids.shape, 1 / count))
    owner, classes = weights.nonzero(as_tuple=True)
    offsets = torch.zeros(len(q) + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(owner, minlength=len(q)).cumsum(0)
    return Target(q.shape[1], offsets, classes, weights[owner, classes], None, torch.zeros(len(q)))


def soft_bytes(rows: list[SoftLabels], encoding: Encoding, num_classes: int) -> tuple[int, float]:
    """Measure the size of the soft-label columns alone.

    Returns:
        Bytes in Parquet, and the order-0 entropy of the values in bytes.
    """
    schema = pa.schema(list(soft_columns(encoding, num_classes).items()))
    nothing = TokenizedExample(0, 0, np.zeros(0, dtype=np.int32))
    table = pack(block_of([CachedExample(nothing, soft, 0.0, 0.0, 0) for soft in rows], schema), schema)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **parquet_settings(schema))
    group = pq.ParquetFile(buffer).metadata.row_group(0)
    size = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
    entropy = 0.0
    for name in table.column_names:
        values = table.column(name).combine_chunks().values.to_numpy(zero_copy_only=False)
        counts = np.unique(values, return_counts=True)[1]
        entropy -= float((counts * np.log2(counts / counts.sum())).sum()) / 8
    return size, entropy


def _line(name: str, found: Fidelity | None, size: float, entropy: float | None) -> dict[str, Any]:
    assert found is not None
    one_draw = found.noise / found.noise_share
    return {
        "name": name,
        "kept": found.kept,
        "bytes": size,
        "entropy": entropy,
        "noise": found.noise,
        "noise_share": found.noise_share,
        "bias": found.bias,
        "bias_share": (found.bias or 0.0) / one_draw,
        "angle": found.angle,
        "norm_ratio": found.norm_ratio,
        "mass": found.kept_mass.get("1"),
    }


def show_curve(lines: list[dict[str, Any]], folder: Path) -> None:
    """Print the table and the cost at equal noise, and draw the figure."""
    click.echo(
        f"{'':<28}{'kept':>7}{'B/position':>12}{'entropy':>9}{'noise':>10}{'share':>8}{'bias':>10}{'share':>9}{'angle':>8}"
    )
    for line in lines:
        entropy = "-" if line["entropy"] is None else f"{line['entropy']:.1f}"
        click.echo(
            f"{line['name']:<28}{line['kept']:>7.1f}{line['bytes']:>12.1f}{entropy:>9}{line['noise']:>10.2e}{line['noise_share']:>8.2%}"
            f"{line['bias']:>10.1e}{line['bias_share']:>9.3%}{line['angle']:>7.1f}\N{DEGREE SIGN}"
        )
    sampled = sorted((line for line in lines if line["name"].startswith("sampled")), key=lambda line: line["noise"])
    noise, size = np.log([line["noise"] for line in sampled]), np.log([line["bytes"] for line in sampled])
    for line in lines:
        if "draws" in line["name"]:
            equal = math.exp(float(np.interp(math.log(line["noise"]), noise, size)))
            click.echo(
                f"at the noise of {line['name']}: sampled takes {equal:.1f} bytes a position, the draws {line['bytes']:.1f}"
            )
    plot(lines, folder / "encodings.png")


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Plot bytes against noise and bias."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True, layout="constrained")
    families = {
        "sampled": ("sampled", "o-"),
        "draws with replacement": ("draws", "s--"),
        "top-k, ghost": (", ghost", "^:"),
        "top-k, renormalised": (", renormalised", "v:"),
        "top-k, zeroed": (", zeroed", "x:"),
    }
    for label, (key, style) in families.items():
        chosen = [line for line in lines if key in line["name"] and not line["name"].startswith("top-p")]
        chosen.sort(key=lambda line: line["bytes"])
        for axis, what in zip(axes, ("noise_share", "bias_share"), strict=True):
            points = [line for line in chosen if line[what] > 1e-7]
            axis.plot([p["bytes"] for p in points], [p[what] for p in points], style, label=label, markersize=5)
    for axis, what in zip(axes, ("noise", "bias, which does not average away"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="bytes a position", title=what)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xticks([10, 20, 50, 100, 200, 500])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of one drawn label's noise")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rows(teacher: LoadedModel, length: int) -> Iterator[TokenizedExample]:
    from datasets import load_dataset

    data = load_dataset("json", data_files={"train": str(DATA / "train.jsonl")}, split="train")
    source = from_datasets(data, Columns(label=None))
    found = read_examples(source, "train", 0, len(data), None)
    for item in get_task("causal-lm").tokenize(found, "train", teacher.tokenizer, Tokenization(length)):
        if isinstance(item, TokenizedExample) and item.num_tokens == length:
            yield item


def _cut(soft: SoftLabels, start: int, stop: int) -> SoftLabels:
    from pipeline.softlabels import rows

    return rows(soft, start, min(stop, len(soft)))


# ----------------------------------------------------------------------------------------- training

#: Method -> (cache, loss).
WAYS: dict[str, tuple[str, softlabel.Loss]] = {
    "hard": ("sampled-25", softlabel.Loss(1.0, 0.0)),
    "full": ("full", softlabel.Loss(0.0, 1.0, temperature=1.0)),
    "top-12, renormalised": ("top-12", softlabel.Loss(0.0, 1.0, temperature=1.0, tail="renormalize")),
    "top-50, renormalised": ("top-50", softlabel.Loss(0.0, 1.0, temperature=1.0, tail="renormalize")),
    "50 draws": ("draws-50", softlabel.Loss(0.0, 1.0, temperature=1.0)),
    "sampled c = 25": ("sampled-25", softlabel.Loss(0.0, 1.0, temperature=1.0)),
}
ENCODINGS: dict[str, Encoding] = {
    "full": softlabel.Full(),
    "sampled-25": Sampled(25.0),
    "top-12": TopK(12, (1.0,)),
    "top-50": TopK(50, (1.0,)),
}


def make_data(folder: Path) -> Path:
    """Write the first articles of the demo, few enough to store every full distribution."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    for split, count in ARTICLES.items():
        lines = (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (data / f"{split}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    return data


def make_cache(folder: Path, name: str) -> Any:
    """Return a cache of the articles.

    Caches of draws are made from the cache with full distributions.
    """
    if name in ENCODINGS:
        data = make_data(folder)
        return softlabel.cache_logits(
            DATA / "smollm2", str(data), folder / name, task="causal-lm", encoding=ENCODINGS[name], max_length=LENGTH
        )
    path = folder / name
    try:
        return softlabel.Cache.open(path)
    except softlabel.PipelineError:
        pass
    full = make_cache(folder, "full")
    draws = int(name.rpartition("-")[2])
    generator = torch.Generator().manual_seed(0)

    def each() -> Iterator[softlabel.LabelledRow]:
        for row in full.dataset("train"):
            goal = drawn(row.soft.top_logprobs.reshape(len(row.soft), -1).exp(), draws, generator)
            count = len(goal)
            soft = SoftLabels(
                TopK(draws, (1.0,)),
                goal.num_classes,
                top_offsets=goal.offsets,
                top_ids=goal.ids,
                top_logprobs=goal.weights.log(),
                tail_offsets=torch.zeros(count + 1, dtype=torch.int64),
                tail_ids=torch.zeros(0, dtype=torch.int64),
                log_residuals=torch.full((count, 1), -torch.inf),
            )
            yield softlabel.LabelledRow(
                input_ids=row.example.input_ids,
                soft_labels=soft,
                supervised=row.example.supervised,
                text_bytes=row.example.text_bytes,
            )

    return softlabel.write_cache(
        each(),
        path,
        task="causal-lm",
        tokenizer=full.tokenizer,
        encoding=TopK(draws, (1.0,)),
        teacher="SmolLM2",
        overwrite=True,
    )


class PairedTrainer(softlabel.DistillationTrainer):
    """Trains one epoch in an order that depends on the seed alone.

    All caches are trained on with the same steps.
    """

    def get_train_dataloader(self) -> Any:
        """Return batches of a seeded permutation."""
        data: Any = self.train_dataset
        order = np.random.default_rng(self.args.data_seed).permutation(len(data))
        size = self._train_batch_size
        batches = [order[i : i + size].tolist() for i in range(0, len(order), size)]
        collate: Any = self.collator
        return DataLoader(data, batch_sampler=batches, collate_fn=collate)


def train(folder: Path, way: str, seed: int) -> dict[str, float]:
    """Train one student, and return its held-out loss, KL from the teacher and ECE."""
    name, loss = WAYS[way]
    start = folder / "student-init"
    if not (start / "config.json").exists():
        softlabel.init_student(DATA / "smollm2", start, layers=LAYERS)
    args = training_arguments(
        str(folder / "student"),
        {"warmup_steps": 0.1, "save_strategy": "no", "data_seed": seed},
        num_train_epochs=1,
        learning_rate=3e-4,
        per_device_train_batch_size=2,
        seed=seed,
    )
    student = AutoModelForCausalLM.from_pretrained(start)
    trainer = PairedTrainer(student, args, cache=make_cache(folder, name), loss=loss)
    show_progress(trainer, f"{way} / {seed}")
    trainer.train()
    found = softlabel.evaluate(make_cache(folder, "full"), {"student": student}).students[0]
    return {"loss": found.metrics["loss"], "kl": found.kl or 0.0, "ece": found.metrics["ece"]}


def compare_training(folder: Path, seeds: int) -> None:
    """Train every method with every seed, except for runs that are stored already."""
    results: dict[str, dict[str, float]] = {}
    path = folder / "training.json"
    if path.is_file():
        results = json.loads(path.read_text())
    for seed, way in itertools.product(range(seeds), WAYS):
        key = f"{way} / {seed}"
        if key not in results:
            results[key] = train(folder, way, seed)
            path.write_text(json.dumps(results, indent=1) + "\n")
            click.echo(f"{key}: " + "  ".join(f"{k} {v:.4f}" for k, v in results[key].items()), err=True)
    click.echo(
        f"\n{'':<24}{'B/position':>11}{'loss':>9}{'KL':>9}{'ECE':>8}{'of the gap closed: in loss, by seed; in KL':>46}"
    )
    means = {
        way: {
            key: statistics.fmean(results[f"{way} / {seed}"][key] for seed in range(seeds))
            for key in ("loss", "kl", "ece")
        }
        for way in WAYS
    }
    for way, (name, _) in WAYS.items():
        mean = means[way]
        closed = {
            key: (means["hard"][key] - mean[key]) / (means["hard"][key] - means["full"][key]) for key in ("loss", "kl")
        }
        each = []
        for seed in range(seeds):
            hard, full, ours = (results[f"{name} / {seed}"]["loss"] for name in ("hard", "full", way))
            each.append((hard - ours) / (hard - full))
        size = "-" if way == "hard" else f"{cache_bytes(folder, name):.1f}"
        shown = " ".join(f"{share:.0%}" for share in each)
        click.echo(
            f"{way:<24}{size:>11}{mean['loss']:>9.3f}{mean['kl']:>9.3f}{mean['ece']:>8.1%}{closed['loss']:>9.0%}  ({shown}){closed['kl']:>8.0%}"
        )


def cache_bytes(folder: Path, name: str) -> float:
    """Return the bytes per position of the soft-label columns; draws count 3 bytes per class."""
    cache = make_cache(folder, name)
    contract = cache.manifest.contract
    rows = cache.dataset("train")
    positions = sum(shard.positions for shard in cache.manifest.split_shards("train"))
    if name.startswith("draws"):
        return float(3 * sum(len(row.soft.top_ids) for row in rows) / positions)
    columns = set(soft_columns(contract.encoding, contract.num_classes))
    size = 0
    for shard in cache.manifest.split_shards("train"):
        metadata = pq.ParquetFile(cache.root / "data" / f"{shard.name}.parquet").metadata
        for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
            parts = (group.column(i) for i in range(group.num_columns))
            size += sum(part.total_compressed_size for part in parts if part.path_in_schema.split(".")[0] in columns)
    return float(size / positions)


@click.command()
@click.option("--output", default="runs/bench-encodings", show_default=True, help="Where caches and figures go.")
@click.option("--positions", default=4096, show_default=True, help="Positions of the curve.")
@click.option("--seeds", default=3, show_default=True, help="Students of each way.")
@click.option("--only", type=click.Choice(["curve", "training"]), help="One part of it.")
def main(output: str, positions: int, seeds: int, only: str | None) -> None:
    """Measure bytes, noise and bias of each soft-label encoding, and the students trained on it."""
    from pipeline.models.quiet import quiet_libraries

    quiet_libraries()
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    if only != "training":
        show_curve(measure_curve(folder, positions), folder)
    if only != "curve":
        compare_training(folder, seeds)


if __name__ == "__main__":
    main()
