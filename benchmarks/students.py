"""Compare students of soft labels with the same students on hard labels, over several seeds.

    make bench            (or: python -m benchmarks.students --seeds 3)

The students are the three of the demo. Each seed draws other initial weights and another order. A
pair (student, control) shares both, so that the gain is paired, and its interval is a paired t
interval over the seeds. Teacher and cache are the demo's and are created if they are missing.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
import numpy as np

from pipeline.cache import Cache
from pipeline.cli import FUNCTIONS
from pipeline.config import ConfigFile, InitStudentConfig, TrainStudentConfig, load_config, resolve
from pipeline.cross_tokenizer.students import init_student
from pipeline.evaluation import evaluate
from pipeline.metrics import paired_mean_interval
from pipeline.models.initialize import Shape
from pipeline.models.quiet import quiet_libraries
from pipeline.training.run import run as train
from pipeline.workflow import run as run_stages


@click.command()
@click.option("--config", default="data/bbc/demo.yaml", show_default=True, help="Run file of the demo.")
@click.option("--seeds", default=3, type=click.IntRange(2), show_default=True, help="How many seeds.")
@click.option(
    "--output", default="runs/bench-students", show_default=True, help="Where the students and the figures go."
)
def main(config: str, seeds: int, output: str) -> None:
    """Train the demo's students with several seeds and print the gains with their intervals."""
    quiet_libraries()
    file = load_config(config)
    run_stages(file, FUNCTIONS, through="cache-logits")
    accuracy: dict[str, list[float]] = {}
    loss: dict[str, list[float]] = {}
    retention: list[float] = []
    teacher = 0.0
    for seed in range(seeds):
        students = trained_students(file, output, seed)
        report = evaluate(str(file.sections["cache-logits"][0]["output"]), students)
        teacher = report.teacher.metrics["accuracy"]
        for line in report.students:
            accuracy.setdefault(line.name, []).append(line.metrics["accuracy"])
            loss.setdefault(line.name, []).append(line.metrics["loss"])
        retention.append(report.students[0].metrics["accuracy"] / teacher)
        figures = [
            f"{line.name} {line.metrics['accuracy']:.1%} (loss {line.metrics['loss']:.3f})" for line in report.students
        ]
        click.echo(f"seed {seed}: {', '.join(figures)}")
    print_summary(teacher, accuracy, loss, retention)
    figures_kept = {"teacher": teacher, "accuracy": accuracy, "loss": loss, "retention": retention}
    Path(output, "students.json").write_text(json.dumps(figures_kept, indent=1) + "\n")


def trained_students(file: ConfigFile, output: str, seed: int) -> dict[str, str]:
    """Train the file's students with another seed of initial weights and order.

    Students that are trained already are reused.

    Returns:
        Name -> directory.
    """
    shape: InitStudentConfig = resolve(InitStudentConfig, file, file.sections["init-student"][0], {})
    start = f"{output}/init-{seed}"
    init_student(
        shape.teacher,
        start,
        config=Shape(shape.num_layers or 0, shape.hidden_size or 0, shape.num_heads or 0),
        seed=seed,
    )
    students = {}
    for section in file.sections["train-student"]:
        plain: TrainStudentConfig = resolve(TrainStudentConfig, file, section, {})
        name = Path(plain.output).name
        students[name] = f"{output}/{name}-{seed}"
        config = dataclasses.replace(plain, student=start, output=students[name], seed=seed)
        made_from = json.dumps([dataclasses.asdict(config), Cache.open(config.cache[0]).manifest.cache_id])
        mark = Path(f"{students[name]}.json")
        if not mark.is_file() or mark.read_text() != made_from:
            train(dataclasses.replace(config, overwrite=True))
            mark.write_text(made_from)
    return students


def print_summary(
    teacher: float, accuracy: dict[str, list[float]], loss: dict[str, list[float]], retention: list[float]
) -> None:
    """Print means over the seeds and the gains over each control.

    Gains are in points of accuracy and in nats of test loss.
    """
    click.echo(f"\nteacher {teacher:.1%}; on the test split, mean over {len(retention)} seeds:")
    for name in accuracy:
        click.echo(f"  {name:<24} accuracy {np.mean(accuracy[name]):.1%}  loss {np.mean(loss[name]):.3f}")
    student, *controls = accuracy
    for control in controls:
        points = np.subtract(accuracy[student], accuracy[control]) * 100
        nats = np.subtract(loss[control], loss[student])
        click.echo(
            f"gain over {control}: {_interval(points, '+.1f')} points of accuracy, {_interval(nats, '+.3f')} nats"
        )
    click.echo(f"retention: {_interval(np.asarray(retention), '.1%')}")


def _interval(values: np.ndarray, form: str) -> str:
    """Format the mean and its paired t interval over the seeds."""
    interval = paired_mean_interval(values)
    return f"{values.mean():{form}} (95% interval {interval.low:{form}} to {interval.high:{form}})"


if __name__ == "__main__":
    main()
