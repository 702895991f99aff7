"""Compare learning rates, numbers of steps and losses, to choose the training defaults.

The defaults of train-teacher and train-student are derived from these runs.

    make bench-defaults            (or: python -m benchmarks.defaults)

There are four data sets (`data/first_hour`) with one teacher each, and four students: random
weights at two sizes, layers copied from the teacher, and the pretrained encoder that the teacher
was fine-tuned from. Every run is evaluated on the validation split during training; the test split
is not read. Results are appended to `results.jsonl` in the output folder, and runs listed there are
not repeated.

Studies:

    teacher     learning rate and epochs of the fine-tuning
    rate        learning rate of each student, one loss
    loss        divergence, temperature and weights, at the best learning rate of `rate`
    steps       number of training steps
    batch       rows per step
    defaults    current and former defaults of `train-student` beside the best of `rate`
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from pipeline.capture.run import run as capture
from pipeline.config import CacheLogitsConfig, DataConfig, TrainStudentConfig, TrainTeacherConfig
from pipeline.cross_tokenizer.students import init_student
from pipeline.models.initialize import Shape
from pipeline.models.quiet import quiet_libraries
from pipeline.training.run import run as train
from pipeline.training.teacher import run as train_teacher

ENCODER = "data/bbc/minilm"
DATA = {
    "news": ("Headline & Text", "Topic", 48),
    "sentiment": ("tweet_body", "Feeling (majority)", 64),
    "tickets": ("Ticket Body", "Queue", 64),
    "dialogue": ("utterance", "subject_name", 48),
}
#: Name -> shape of random weights, or layers copied from the teacher, or None for the pretrained
#: encoder with a new head.
STUDENTS: dict[str, Shape | tuple[int, ...] | None] = {
    "random 1x64": Shape(1, 64, 1),
    "random 2x128": Shape(2, 128, 2),
    "copied 2x384": (0, 5),
    "pretrained 6x384": None,
}
RATES = {
    "random 1x64": (1e-3, 3e-3),
    "random 2x128": (3e-4, 1e-3),
    "copied 2x384": (1e-4, 3e-4),
    "pretrained 6x384": (1e-4, 3e-4),
}
STEPS = {"random": 1000, "copied": 300, "pretrained": 300}
#: The students in SLOW are only trained on the data sets in FEW.
SLOW, FEW = ("pretrained 6x384",), ("tickets",)
#: hard weight, soft weight, temperature, divergence
PLAIN = (0.1, 0.9, 2.0, "forward-kl")
LOSSES = (
    (0.5, 0.5, 2.0, "forward-kl"),
    (0.1, 0.9, 1.0, "logit-mse"),
)
BATCH = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """Settings that identify one run of a student or a teacher in the results."""

    study: str
    data: str
    student: str
    seed: int = 0
    learning_rate: float | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    loss: tuple[float, float, float, str] | None = None


def trials(study: str, found: Sequence[Mapping[str, Any]], data: Sequence[str]) -> Iterator[Trial]:
    """Yield the runs of a study in order; later studies use earlier results from `found`."""
    for name in data:
        if study == "teacher":
            for rate, epochs in ((5e-5, 3.0), (1e-4, 3.0), (1e-4, 10.0)):
                yield Trial(study, name, "teacher", learning_rate=rate, epochs=epochs, batch_size=16)
            continue
        for student in STUDENTS:
            kind = student.split()[0]
            slow = student in SLOW
            if slow and name not in FEW and study != "defaults":
                continue
            plain = Trial(study, name, student, steps=STEPS[kind], batch_size=BATCH, loss=PLAIN)
            best = dataclasses.replace(plain, learning_rate=best_rate(found, student))
            if study == "rate":
                yield from (dataclasses.replace(plain, learning_rate=rate) for rate in RATES[student])
            elif study == "loss" and (
                student == "random 2x128" or (student == "copied 2x384" and name in ("news", "tickets"))
            ):
                yield from (dataclasses.replace(best, loss=loss) for loss in LOSSES)
            elif study == "steps" and not slow and name in FEW:
                yield dataclasses.replace(best, steps=3 * STEPS[kind])
            elif study == "batch" and not slow and name in FEW:
                yield from (dataclasses.replace(best, batch_size=size) for size in (16, 64))
            elif study == "defaults":
                for seed in (0, 1):
                    yield Trial(study, name, student, seed)
                before = (0.5, 0.5, 2.0, "forward-kl")
                yield Trial(study, name, student, learning_rate=5e-5, epochs=3.0, batch_size=16, loss=before)


def best_rate(found: Sequence[Mapping[str, Any]], student: str) -> float | None:
    """Return the best learning rate in the study `rate` among those tried on the most data sets."""
    scores: dict[float, list[float]] = {}
    for line in found:
        if line["study"] == "rate" and line["student"] == student:
            scores.setdefault(line["learning_rate"], []).append(line["best"]["accuracy"])
    return max(scores, key=lambda rate: (len(scores[rate]), float(np.mean(scores[rate])))) if scores else None


def run_trial(trial: Trial, folder: Path) -> dict[str, Any]:
    """Train and evaluate one trial, and delete the model."""
    started = time.monotonic()
    output = folder / f"model-{os.getpid()}"
    shutil.rmtree(output, ignore_errors=True)
    curve: list[dict[str, Any]]
    if trial.student == "teacher":
        metrics = make_teacher(trial.data, output, trial.learning_rate or 0, trial.epochs or 0)
        curve = [{"step": None, **metrics}]
    else:
        curve = train_one(trial, folder, output)
    shutil.rmtree(output, ignore_errors=True)
    gc.collect()
    best = max(curve, key=lambda point: point["accuracy"])
    return {
        **dataclasses.asdict(trial),
        "seconds": round(time.monotonic() - started, 1),
        "last": curve[-1],
        "best": best,
        "curve": curve,
    }


def train_one(trial: Trial, folder: Path, output: Path) -> list[dict[str, Any]]:
    """Train a student, and return its validation metrics during training."""
    flags: dict[str, Any] = {}
    training: dict[str, Any] = {}
    if trial.learning_rate is not None:
        flags["learning_rate"] = trial.learning_rate
        training = {"warmup_steps": 0.1, "save_strategy": "no"}
    if trial.steps is not None:
        flags["max_steps"] = trial.steps
        training |= {"eval_strategy": "steps", "eval_steps": 100}
    if trial.epochs is not None:
        flags["epochs"] = trial.epochs
        training = {"save_strategy": "no"}
    if trial.batch_size is not None:
        flags["batch_size"] = trial.batch_size
    if trial.loss is not None:
        names = ("hard_weight", "soft_weight", "temperature", "divergence")
        flags |= dict(zip(names, trial.loss, strict=True))
    config = TrainStudentConfig(
        cache=(str(cache_of(trial.data, folder)),),
        student=str(start_of(trial, folder)),
        output=str(output),
        seed=trial.seed,
        training=training,
        **flags,
    )
    result = train(config)
    state = json.loads((output / "trainer_state.json").read_text())
    kept = ("step", "eval_accuracy", "eval_loss", "eval_agreement", "eval_divergence")
    curve = [
        {name.removeprefix("eval_"): entry[name] for name in kept}
        for entry in state["log_history"]
        if "eval_accuracy" in entry
    ]
    end = {name: result.metrics[name] for name in ("accuracy", "loss", "agreement", "divergence")}
    return [*curve, {"step": result.steps, **end}]


def data_config(name: str) -> DataConfig:
    """Return the files and columns of a data set."""
    text, label, length = DATA[name]
    return DataConfig(
        dataset=f"data/first_hour/{name}",
        data_files=("train=train.csv", "validation=validation.csv"),
        text_column=text,
        label_column=label,
        max_length=length,
    )


def make_teacher(name: str, output: Path, rate: float, epochs: float) -> dict[str, float]:
    """Fine-tune the encoder and return its metrics."""
    return train_teacher(
        TrainTeacherConfig(
            task="sequence-classification",
            data=data_config(name),
            model=ENCODER,
            output=str(output),
            learning_rate=rate,
            epochs=epochs,
            training={"warmup_steps": 0.1},
        )
    )


def cache_of(name: str, folder: Path) -> Path:
    """Return the cache of a data set, and create it if it is missing.

    Its teacher is fine-tuned for 10 epochs at 1e-4.
    """
    cache, teacher = folder / name / "cache", folder / name / "teacher"
    if not (teacher / "metrics.json").is_file():
        make_teacher(name, teacher, 1e-4, 10)
    if not (cache / "manifest.json").is_file():
        more = Path("data/first_hour", name, "unlabelled.csv")
        capture(
            CacheLogitsConfig(
                task="sequence-classification",
                data=data_config(name),
                unlabelled=(str(more),) if more.is_file() else (),
                teacher=str(teacher),
                output=str(cache),
                encoding="full",
            )
        )
    return cache


def start_of(trial: Trial, folder: Path) -> Path:
    """Return the path of the initial student."""
    made = STUDENTS[trial.student]
    if made is None:
        return Path(ENCODER)
    output = folder / trial.data / f"{trial.student.replace(' ', '-')}-{trial.seed}"
    if not (output / "config.json").is_file():
        cache_of(trial.data, folder)
        teacher = str(folder / trial.data / "teacher")
        shape, layers = (made, None) if isinstance(made, Shape) else (None, made)
        init_student(teacher, output, config=shape, layers=layers, seed=trial.seed)
    return output


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the stored results."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def key_of(line: Mapping[str, Any]) -> str:
    """Return the key that identifies a run."""
    return json.dumps([line[field.name] for field in dataclasses.fields(Trial)], default=list)


def tables(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield tables of final and best validation accuracy, one row per setting.

    Columns are data sets.
    """
    settings: dict[tuple[str, str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for line in found:
        names = ("learning_rate", "steps", "epochs", "batch_size", "loss")
        setting = ", ".join(f"{name} {line[name]}" for name in names if line[name] is not None) or "chosen"
        settings.setdefault((line["study"], line["student"], setting), {}).setdefault(line["data"], []).append(line)
    study = ""
    for (now, student, setting), by_data in settings.items():
        if now != study:
            study = now
            yield f"\n{study}: accuracy on validation at the end (best of the run), mean over the data sets in front"
        ends = {name: float(np.mean([one["last"]["accuracy"] for one in runs])) for name, runs in by_data.items()}
        bests = {name: float(np.mean([one["best"]["accuracy"] for one in runs])) for name, runs in by_data.items()}
        cells = "  ".join(f"{name} {ends[name]:.1%} ({bests[name]:.1%})" for name in ends)
        mean = float(np.mean(list(ends.values())))
        yield f"  {student:<17} {mean:6.1%}  {cells}   {setting}"


@click.command()
@click.option("--study", multiple=True, default=("rate", "loss", "steps", "batch", "teacher", "defaults"))
@click.option("--data", multiple=True, default=tuple(DATA))
@click.option("--output", default="runs/bench-defaults", type=click.Path(path_type=Path), show_default=True)
@click.option("--show", is_flag=True, help="Print the tables of what was measured, and measure nothing.")
def main(study: Sequence[str], data: Sequence[str], output: Path, show: bool) -> None:
    """Run the missing trials, then print the tables."""
    quiet_libraries()
    output.mkdir(parents=True, exist_ok=True)
    path = output / "results.jsonl"
    for name in study if not show else ():
        done = {key_of(line) for line in read_results(path)}
        for trial in trials(name, read_results(path), data):
            if key_of(dataclasses.asdict(trial)) in done:
                continue
            line = run_trial(trial, output)
            with path.open("a") as handle:
                handle.write(json.dumps(line) + "\n")
            end, best = line["last"]["accuracy"], line["best"]["accuracy"]
            click.echo(f"{key_of(line)}: {end:.1%} (best {best:.1%}) in {line['seconds']} s")
    for text in tables(read_results(path)):
        click.echo(text)


if __name__ == "__main__":
    main()
