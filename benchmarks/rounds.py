"""Compare off-policy distillation, on-policy rounds and mixed rounds at equal steps and rows.

    make bench-rounds               (or: python -m benchmarks.rounds)

The teacher is SmolLM2-135M-Instruct, and the text is BBC news (`make demo-lm` and `make demo`
prepare both). The student has 6 of the teacher's 30 layers and is first trained on windows of
articles that the teacher has labelled; every method starts from this student. A row has 16 tokens
of an article and 32 supervised tokens: those of the article (off-policy) or of the student
(on-policy). Every method takes two rounds of 32 rows. Each round passes twice over its rows in 16
steps of 4 rows, with one schedule per round.

Students are evaluated on articles that no method has been trained on. A student writes 32 tokens
after each of 64 prompts, and the teacher labels them. `teacher's NLL` is the mean of the teacher's
negative log-likelihood of the written tokens, `reverse KL` the mean of log p(student) - log
p(teacher) over the same tokens, and `forward KL` the mean of KL(teacher || student) over the
articles' own tokens, all in nats per token. Finished parts are stored in `rounds.json`, and an
interrupted run continues with the next part.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import yaml

LAYERS = [0, 1, 2, 27, 28, 29]
PREFIX, NEW = 16, 32
START_ROWS, ROUNDS, ROWS, HELD_OUT = 768, 2, 32, 64
#: Windows per article; few, so that the rows come from many articles.
OF_AN_ARTICLE = 3
TRAINING = {"hard_weight": 0, "soft_weight": 1, "batch_size": 4}
QUIET = {"warmup_steps": 0.1, "save_strategy": "no"}
TOP_K = {"encoding": "top-k", "top_k": 50, "temperature": [1]}
IDS = {"input_ids_column": "input_ids", "labels_column": "labels", "max_length": PREFIX + NEW}

# ----------------------------------------------------------------------------------------- the data


def windows(path: Path, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Yield rows of token ids whose last 32 are supervised, with the text of their prompts."""
    for line in path.read_text(encoding="utf-8").splitlines():
        ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        for start in range(0, min(len(ids) // (PREFIX + NEW), OF_AN_ARTICLE) * (PREFIX + NEW), PREFIX + NEW):
            row = ids[start : start + PREFIX + NEW]
            yield {
                "input_ids": row,
                "labels": [-100] * PREFIX + row[PREFIX:],
                "prompt": tokenizer.decode(row[:PREFIX]),
            }


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_data(folder: Path, teacher: Path, articles: Path, seeds: int) -> None:
    """Write the rows of the initial student, of each seed and round, and of the evaluation."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(teacher))
    rows = list(windows(articles / "train.jsonl", tokenizer))
    write_rows(folder / "data" / "start" / "train.jsonl", rows[:START_ROWS])
    for seed in range(seeds):
        for number in range(1, ROUNDS + 1):
            first = START_ROWS + (seed * ROUNDS + number - 1) * ROWS
            write_rows(folder / "data" / f"seed-{seed}-{number}" / "train.jsonl", rows[first : first + ROWS])
    held_out = list(windows(articles / "test.jsonl", tokenizer))[::OF_AN_ARTICLE][:HELD_OUT]
    write_rows(folder / "data" / "held-out" / "test.jsonl", held_out)


# ----------------------------------------------------------------------------------------- the runs


def run_file(path: Path, content: Mapping[str, Any]) -> None:
    """Run `softlabel run` on these sections; finished stages are skipped."""
    from pipeline.cli import main

    path.write_text(yaml.safe_dump({"task": "causal-lm", **content}, sort_keys=False), encoding="utf-8")
    failed = main.main(["run", str(path)], standalone_mode=False)
    if failed:
        raise SystemExit(failed)


def start(folder: Path, teacher: Path) -> dict[str, float]:
    """Train the initial student of every method, and label the articles for evaluation."""
    run_file(
        folder / "start.yaml",
        {
            "cache-logits": [
                capture(teacher, folder / "data" / "start", folder / "cache-start"),
                capture(teacher, folder / "data" / "held-out", folder / "cache-held-out"),
            ],
            "init-student": {"teacher": str(teacher), "output": str(folder / "student-init"), "layer": LAYERS},
            "train-student": {
                "cache": str(folder / "cache-start"),
                "student": str(folder / "student-init"),
                "output": str(folder / "student-0"),
                "max_steps": 96,
                "learning_rate": 5e-4,
                "training": QUIET,
                **TRAINING,
            },
        },
    )
    return measure(folder, teacher, folder / "student-0", folder / "measured" / "start", seed=0)


def capture(teacher: Path, data: Path | str, output: Path | str, **settings: Any) -> dict[str, Any]:
    """Return a section of `cache-logits`."""
    return {"teacher": str(teacher), "output": str(output), "data": {"dataset": str(data), **IDS}, **TOP_K, **settings}


@dataclass(frozen=True)
class Way:
    """A method: its divergence, and which rows a round trains on."""

    name: str
    divergence: str
    written: float
    """Share of the rows that the student writes."""


#: Most important methods first, so that an interrupted run contains them.
WAYS = (
    Way("off-policy, forward KL", "forward-kl", 0.0),
    Way("rounds, reverse KL", "reverse-kl", 1.0),
    Way("mixed rounds, reverse KL", "reverse-kl", 0.5),
    Way("off-policy, reverse KL", "reverse-kl", 0.0),
)


def train(folder: Path, teacher: Path, way: Way, seed: int) -> dict[str, float]:
    """Train one method with one seed, and evaluate the student."""
    here = folder_of(folder, way, seed)
    here.mkdir(exist_ok=True)
    num_written = round(way.written * ROWS)
    data, off = folder / "data" / f"seed-{seed}-{{round}}", folder / f"cache-off-{seed}-{{round}}-{ROWS - num_written}"
    written, own = here / "written-{round}", here / "cache-{round}"
    caches = [str(cache) for cache, share in ((own, way.written), (off, 1 - way.written)) if share]
    sections: dict[str, Any] = {
        "rounds": ROUNDS,
        "cache-logits": [
            *([capture(teacher, written, own)] if way.written else []),
            *([capture(teacher, data, off, rows=f"0:{ROWS - num_written}")] if way.written < 1 else []),
        ],
        "train-student": {
            "cache": caches,
            **({"proportion": [way.written, 1 - way.written]} if len(caches) > 1 else {}),
            "student": str(here / "student-{previous}"),
            "output": str(here / "student-{round}"),
            "divergence": way.divergence,
            "epochs": 2,
            "learning_rate": 2e-4,
            "seed": seed,
            "training": QUIET,
            **TRAINING,
        },
    }
    if way.written:
        sections["generate"] = writing(
            here / "student-{previous}", data, written, f"{ROWS - num_written}:{ROWS}", "{round}" + str(seed)
        )
    if not (here / "student-0").exists():
        (here / "student-0").symlink_to((folder / "student-0").resolve())
    run_file(here / "rounds.yaml", sections)
    found = measure(folder, teacher, here / f"student-{ROUNDS}", here, seed=seed)
    shutil.rmtree(here / f"student-{ROUNDS}")  # frees hundreds of megabytes
    return found


def writing(model: Path, data: Path, output: Path, rows: str, seed: str) -> dict[str, Any]:
    """Return a section of `generate` that writes 32 tokens after the prompts of some rows."""
    return {
        "model": str(model),
        "dataset": str(data),
        "prompt_column": "prompt",
        "rows": rows,
        "output": str(output),
        "max_new_tokens": NEW,
        "seed": seed,
        "rows_per_shard": 64,
    }


def measure(folder: Path, teacher: Path, student: Path, here: Path, *, seed: int) -> dict[str, float]:
    """Evaluate a student on completions of new prompts and on the articles' continuations."""
    from pipeline.evaluation import evaluate
    from pipeline.rounds import measure_written

    here.mkdir(parents=True, exist_ok=True)
    written, cache = here / "written", here / "cache"
    run_file(
        here / "measure.yaml",
        {
            "generate": writing(student, folder / "data" / "held-out", written, f"0:{HELD_OUT}", str(1000 + seed)),
            "cache-logits": capture(teacher, written, cache),
        },
    )
    found = measure_written(cache, written)
    report = evaluate(str(folder / "cache-held-out"), {"student": str(student)}, split="test")
    line = report.students[0]
    assert found.reverse_kl is not None
    assert line.kl is not None
    return {
        "teacher_nll": found.teacher_nll,
        "reverse_kl": found.reverse_kl,
        "forward_kl": line.kl,
        "agreement": line.agreement or 0.0,
        "tokens": found.tokens,
    }


# ---------------------------------------------------------------------------------------- the table

SHOWN = {"teacher_nll": "teacher's NLL", "reverse_kl": "reverse KL", "forward_kl": "forward KL"}
#: Degrees of freedom -> 97.5% quantile of Student's t.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: Sequence[float]) -> str:
    """Format the mean and the half-width of its 95% interval over seeds (Student's t)."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = _T[min(len(values) - 1, max(_T))] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def table(parts: Mapping[str, Mapping[str, float]], seeds: int) -> Iterator[str]:
    """Yield Markdown lines with each method and its differences from the first, paired by seed."""
    yield f"| way | seeds | {' | '.join(SHOWN.values())} |"
    yield f"|---|---|{'---|' * len(SHOWN)}"
    if "start" in parts:
        first = [f"{parts['start'][name]:.3f}" for name in SHOWN]
        yield f"| start | | {' | '.join(first)} |"
    there = {way: [s for s in range(seeds) if part_name(way, s) in parts] for way in WAYS}
    for way, found in there.items():
        if found:
            cells = [interval([parts[part_name(way, s)][name] for s in found]) for name in SHOWN]
            yield f"| {way.name} | {len(found)} | {' | '.join(cells)} |"
    for way in WAYS[1:]:
        both = [s for s in there[way] if s in there[WAYS[0]]]
        if both:
            cells = [
                interval([parts[part_name(way, s)][name] - parts[part_name(WAYS[0], s)][name] for s in both])
                for name in SHOWN
            ]
            yield f"| {way.name} minus {WAYS[0].name} | {len(both)} | {' | '.join(cells)} |"


def paired(folder: Path, parts: Mapping[str, Any], seeds: int) -> Iterator[str]:
    """Yield Markdown lines with differences from the first method, paired by prompt.

    The prompts are those of all seeds that both methods have finished. The value of a prompt is the
    mean over its tokens; intervals are 1.96 standard errors.
    """
    yield "| way | prompts | teacher's NLL | reverse KL |"
    yield "|---|---|---|---|"
    for way in WAYS[1:]:
        both = [s for s in range(seeds) if part_name(way, s) in parts and part_name(WAYS[0], s) in parts]
        if both:
            found = np.concatenate(
                [by_prompt(folder_of(folder, way, s)) - by_prompt(folder_of(folder, WAYS[0], s)) for s in both]
            )
            half = 1.96 * found.std(0, ddof=1) / math.sqrt(len(found))
            cells = [f"{mean:.3f} ± {width:.3f}" for mean, width in zip(found.mean(0), half, strict=True)]
            yield f"| {way.name} minus {WAYS[0].name} | {len(found)} | {' | '.join(cells)} |"


def by_prompt(here: Path) -> np.ndarray:
    """Return (prompts, 2): mean teacher NLL and mean log p(student) - log p(teacher) per prompt."""
    import pyarrow.parquet as pq

    import pipeline as softlabel

    rows = softlabel.Cache.open(here / "cache").dataset("test")
    written = pq.read_table(here / "written" / "data", columns=["source_row", "logprob", "completion_tokens"])
    order = np.argsort(np.asarray(written["source_row"]))
    tokens, logprob = (np.asarray(written[name])[order] for name in ("completion_tokens", "logprob"))
    nll = rows.column("teacher_nll_sum")[np.argsort(rows.column("source_row"))].astype(np.float64)
    return np.stack([nll / tokens, (logprob + nll) / tokens], -1)


def folder_of(folder: Path, way: Way, seed: int) -> Path:
    """Return the output folder of one method and seed."""
    return folder / f"{way.name.replace(', ', '-').replace(' ', '-').lower()}-{seed}"


def part_name(way: Way, seed: int) -> str:
    """Return the key of one method and seed in `rounds.json`."""
    return f"{way.name}, seed {seed}"


@dataclass(frozen=True)
class Kept:
    """Stores finished parts in a JSON file."""

    path: Path

    def part(self, name: str, measured: Callable[[], dict[str, float]]) -> None:
        """Measure and store a part, unless it is stored already."""
        parts = self.parts()
        if name not in parts:
            self.path.write_text(json.dumps({**parts, name: measured()}, indent=1) + "\n", encoding="utf-8")

    def parts(self) -> dict[str, dict[str, float]]:
        """Return all finished parts."""
        found: dict[str, dict[str, float]] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        return found


def measure_all(folder: Path, teacher: Path, articles: Path, seeds: int, kept: Kept) -> None:
    """Measure every unfinished part."""
    make_data(folder, teacher, articles, seeds)
    kept.part("start", lambda: start(folder, teacher))
    main_ways = [(way, seed) for seed in range(seeds) for way in WAYS[:-1]]
    for way, seed in [*main_ways, *((WAYS[-1], seed) for seed in range(seeds))]:
        kept.part(part_name(way, seed), functools.partial(train, folder, teacher, way, seed))


@click.command()
@click.option("--output", default="runs/bench-rounds", show_default=True, help="Where everything goes.")
@click.option("--teacher", default="data/bbc_lm/smollm2", show_default=True, help="The teacher.")
@click.option("--articles", default="data/bbc", show_default=True, help="train.jsonl and test.jsonl with a text a row.")
@click.option("--seeds", default=3, show_default=True, help="Each has its own rows, draws and order.")
@click.option("--show", is_flag=True, help="Only the tables of what is finished.")
def main(output: str, teacher: str, articles: str, seeds: int, show: bool) -> None:
    """Compare off-policy distillation, rounds and mixed rounds at equal steps."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    kept = Kept(folder / "rounds.json")
    if not show:
        measure_all(folder, Path(teacher), Path(articles), seeds, kept)
    click.echo("\n".join([*table(kept.parts(), seeds), "", *paired(folder, kept.parts(), seeds)]))


if __name__ == "__main__":
    main()
