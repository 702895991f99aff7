"""Compare students whose tokenizer differs from their teacher's.

Measures what soft labels add for such students, and what a small vocabulary gains.

    make bench-cross-tokenizer      (or: python -m benchmarks.cross_tokenizer)

**Small vocabulary.** The teacher is SmolLM2-135M-Instruct (49,152 tokens), and the text is BBC
news. The students have 4 layers and a byte-level BPE of 8,192 tokens trained on the cached text.
They are compared with a student that uses the teacher's own tokenizer and has as many parameters,
nearly all of them in its embedding.

**Long tokens.** The reverse case: the teacher is a language model with a BPE of 1,024 tokens,
trained here on 1,200 articles. The students have the BPE of 8,192 tokens, so that one student token
covers several teacher tokens.

"Both" uses the weight of the mapped target and the weight of the spans; it is compared with the
mapped target alone at the sum of these weights.

All methods use the same rows, steps, schedule and, for each seed, the same initial weights. The
metric is bits per byte on articles that no method has been trained on; intervals are paired t
intervals over the seeds. Finished runs are stored in `runs.json`, and an interrupted run continues
with the next one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

VOCABULARY, SHORT = 8192, 1024
TRAIN, TEST, SHORT_TRAIN = 120, 40, 1200
LENGTH = 256
SHAPE = (4, 192, 4)
EPOCHS, BATCH, RATE = 4, 8, 2e-3


@dataclass(frozen=True)
class Way:
    """A method of training a student."""

    name: str
    settings: Mapping[str, Any]
    own: bool = True
    """Whether the student has its own tokenizer; otherwise it uses the teacher's."""


MAPPED = {"hard_weight": 0.1, "soft_weight": 0.9}
WAYS = (
    Way("cross-entropy alone", {"hard_weight": 1.0, "soft_weight": 0.0}),
    Way("mapped target", MAPPED),
    Way("mapped target, twice its weight", {"hard_weight": 0.1, "soft_weight": 1.8}),
    Way("spans", {**MAPPED, "align": "spans"}),
    Way("both", {**MAPPED, "align": "both"}),
    Way("the teacher's tokenizer, cross-entropy alone", {"hard_weight": 1.0, "soft_weight": 0.0}, own=False),
    Way("the teacher's tokenizer, soft labels", MAPPED, own=False),
)
PAIRS = {"small-vocabulary": WAYS, "long-tokens": WAYS[:5]}


def articles(folder: Path, split: str, count: int) -> list[str]:
    """Return the first texts of a split of the demo data."""
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line)["text"] for line in lines]


def make_data(folder: Path, source: Path, train: int) -> Path:
    """Write the training and evaluation articles."""
    data = folder / "data"
    for split, count in (("train", train), ("test", TEST)):
        write_rows(data / f"{split}.jsonl", articles(source, split, count))
    return data


def write_rows(path: Path, texts: list[str]) -> None:
    """Write texts as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def texts_of(data: Path) -> Iterator[str]:
    """Yield the training texts."""
    for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["text"]


def make_tokenizer(teacher: Path, data: Path, size: int) -> Any:
    """Train a BPE of the teacher's kind on the training text."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(teacher)).train_new_from_iterator(texts_of(data), size)


def make_cache(teacher: Path, data: Path, output: Path) -> None:
    """Run stage 1 if the cache is missing."""
    from pipeline.capture.run import run
    from pipeline.config import CacheLogitsConfig, DataConfig

    if not (output / "manifest.json").is_file():
        settings = DataConfig(dataset=str(data), max_length=LENGTH)
        run(CacheLogitsConfig(
            task="causal-lm", data=settings, teacher=str(teacher), output=str(output), store_label_logprobs=True
        ))  # fmt: skip


def make_student(teacher: Path, output: Path, tokenizer: Any, width: int, seed: int) -> int:
    """Save a randomly initialised student of this width, and return its number of parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    layers, _, heads = SHAPE
    config = AutoConfig.from_pretrained(str(teacher))
    config.update({
        "vocab_size": len(tokenizer), "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 3 * width,
        "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": width // heads,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "dtype": "float32",
    })  # fmt: skip
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return int(model.num_parameters())


def width_of(vocabulary: int, parameters: int) -> int:
    """Return the multiple of 8 as width whose student comes closest to this many parameters."""
    layers = SHAPE[0]

    def count(width: int) -> int:
        return vocabulary * width + layers * (4 * width * width + 3 * width * 3 * width + 2 * width) + width

    return min(range(16, 513, 8), key=lambda width: abs(count(width) - parameters))


def train_and_measure(cache: Path, student: Path, output: Path, way: Way, seed: int, epochs: int) -> float:
    """Train a student, and return its bits per byte on the test split."""
    from pipeline.config import TrainStudentConfig
    from pipeline.evaluation import evaluate
    from pipeline.training.run import run

    run(TrainStudentConfig(
        cache=(str(cache),), student=str(student), output=str(output), epochs=epochs, batch_size=BATCH,
        learning_rate=RATE, seed=seed, overwrite=True, **way.settings,
        training={"save_strategy": "no", "warmup_steps": 0.1, "lr_scheduler_type": "cosine", "eval_strategy": "no"},
    ))  # fmt: skip
    report = evaluate(str(cache), {"student": str(output)})
    return float(report.students[0].metrics["bits_per_byte"])


def teacher_bits(cache: Path) -> float:
    """Return the teacher's bits per byte, computed from the cache."""
    from pipeline.evaluation import evaluate

    return float(evaluate(str(cache), {}).teacher.metrics["bits_per_byte"])


class Runs:
    """Stores finished runs in a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def keep(self, key: str, value: Any) -> None:
        """Add one result and write the file."""
        self.found[key] = value
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")


def short_teacher(folder: Path, teacher: Path, data: Path, source: Path) -> Path:
    """Train a teacher with a vocabulary of 1,024 tokens on the text alone.

    The cache written by its untrained weights only supplies the rows.
    """
    from pipeline.config import TrainStudentConfig
    from pipeline.training.run import run

    output = folder / "short-teacher"
    if (output / "distillation.json").is_file():
        return output
    start = folder / "short-start"
    make_student(teacher, start, make_tokenizer(teacher, data, SHORT), 256, seed=0)
    whole = folder / "whole"
    write_rows(whole / "train.jsonl", articles(source, "train", SHORT_TRAIN))
    cache = folder / "whole-cache"
    make_cache(start, whole, cache)
    way = Way("", {"hard_weight": 1.0, "soft_weight": 0.0})
    run(TrainStudentConfig(
        cache=(str(cache),), student=str(start), output=str(output), epochs=3, batch_size=BATCH, learning_rate=RATE,
        **way.settings, training={"save_strategy": "no", "warmup_steps": 0.1, "lr_scheduler_type": "cosine"},
    ))  # fmt: skip
    return output


def run_pair(
    pair: str, folder: Path, teacher: Path, data: Path, seeds: int, runs: Runs, ways: tuple[str, ...], epochs: int
) -> None:
    """Run all methods and seeds of one pair of tokenizers."""
    cache = folder / f"cache-{pair}"
    make_cache(teacher, data, cache)
    if f"{pair}/teacher" not in runs.found:
        runs.keep(f"{pair}/teacher", teacher_bits(cache))
    from transformers import AutoTokenizer

    own = make_tokenizer(teacher, data, VOCABULARY)
    theirs = AutoTokenizer.from_pretrained(str(teacher))
    for seed in range(seeds):
        parameters = make_student(teacher, folder / "start-own", own, SHAPE[1], seed)
        for way in PAIRS[pair]:
            key = f"{pair}/{way.name}/{seed}"
            if key in runs.found or (ways and way.name not in ways):
                continue
            start, count = folder / "start-own", parameters
            if not way.own:
                start = folder / "start-theirs"
                count = make_student(teacher, start, theirs, width_of(len(theirs), parameters), seed)
            bits = train_and_measure(cache, start, folder / "student", way, seed, epochs)
            runs.keep(key, {"bits_per_byte": bits, "parameters": count})
            click.echo(f"{key}: {bits:.4f} bits per byte, {count:,} parameters")


def table(found: Mapping[str, Any], seeds: int) -> str:
    """Return a table of means over the seeds and differences from the first method of each pair."""
    from pipeline.metrics import paired_mean_interval

    lines = []
    for pair, ways in PAIRS.items():
        if f"{pair}/teacher" not in found:
            continue
        lines += ["", f"{pair}; the teacher {found[f'{pair}/teacher']:.3f}", "",
                  "| student | parameters | bits per byte | less than cross-entropy alone |", "|---|---|---|---|"]  # fmt: skip
        first: np.ndarray | None = None
        for way in ways:
            runs = [found.get(f"{pair}/{way.name}/{seed}") for seed in range(seeds)]
            done = [run for run in runs if run is not None]
            if not done:
                continue
            bits = np.array([run["bits_per_byte"] for run in done])
            first = bits if first is None else first
            paired = min(len(first), len(bits))
            gain = ""
            if bits is not first and paired > 1:
                less = first[:paired] - bits[:paired]
                interval = paired_mean_interval(less)
                gain = f"{less.mean():+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"
            seeds_done = "" if len(done) == seeds else f" ({len(done)} of {seeds} seeds)"
            lines.append(
                f"| {way.name}{seeds_done} | {done[0]['parameters'] / 1e6:.2f}M | {bits.mean():.3f} | {gain} |"
            )
    return "\n".join(lines)


@click.command()
@click.option("--output", default="runs/bench-cross-tokenizer", show_default=True, help="Where everything goes.")
@click.option("--teacher", default="data/bbc_lm/smollm2", show_default=True, help="Directory of SmolLM2.")
@click.option("--articles", default="data/bbc", show_default=True, help="Directory of the demo's articles.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="How many.")
@click.option("--pair", default=tuple(PAIRS), multiple=True, type=click.Choice(list(PAIRS)), help="Which pairs.")
@click.option("--way", multiple=True, type=click.Choice([way.name for way in WAYS]), help="Which ways. Default: all.")
@click.option("--train", default=TRAIN, show_default=True, type=click.IntRange(1), help="Articles to learn from.")
@click.option("--epochs", default=EPOCHS, show_default=True, type=click.IntRange(1), help="Passes over them.")
@click.option("--show", is_flag=True, help="Print the tables of what is finished.")
def main(
    output: str,
    teacher: str,
    articles: str,
    seeds: int,
    pair: tuple[str, ...],
    way: tuple[str, ...],
    train: int,
    epochs: int,
    show: bool,
) -> None:
    """Measure the bits per byte of students whose tokenizer differs from their teacher's."""
    from pipeline.models.quiet import quiet_libraries

    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(folder / "runs.json")
    if not show:
        quiet_libraries()
        data = make_data(folder, Path(articles), train)
        for name in pair:
            of_pair = Path(teacher) if name == "small-vocabulary" else None
            of_pair = of_pair or short_teacher(folder, Path(teacher), data, Path(articles))
            run_pair(name, folder, of_pair, data, seeds, runs, way, epochs)
    click.echo(table(runs.found, seeds))


if __name__ == "__main__":
    main()
