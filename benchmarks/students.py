"""Does a student of soft labels beat the same student on hard labels? The demo's three students over several seeds.

    make bench            (or: python -m benchmarks.students --seeds 3)

Each seed draws other initial weights and another order. A pair (student, control) shares both, so the gain is taken pair by pair, and its
interval is a paired t interval over the seeds. Teacher and cache are the demo's and made first where they are not there.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
import numpy as np

from pipeline.cli import FUNCTIONS, quiet_libraries
from pipeline.config import TrainStudentConfig, load_config, resolve
from pipeline.evaluation import evaluate
from pipeline.metrics import paired_mean_interval
from pipeline.models.initialize import Shape, init_student
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
    shape = Shape(2, 128, 2)
    accuracy: dict[str, list[float]] = {}
    retention: list[float] = []
    teacher = 0.0
    for seed in range(seeds):
        start = init_student(
            str(file.sections["cache-logits"][0]["teacher"]), f"{output}/init-{seed}", config=shape, seed=seed
        )
        students = {}
        for section in file.sections["train-student"]:
            plain: TrainStudentConfig = resolve(TrainStudentConfig, file, section, {})
            name = Path(plain.output).name
            students[name] = f"{output}/{name}-{seed}"
            train(dataclasses.replace(plain, student=str(start), output=students[name], seed=seed))
        report = evaluate(str(file.sections["cache-logits"][0]["output"]), students)
        teacher = report.teacher.metrics["accuracy"]
        for line in report.students:
            accuracy.setdefault(line.name, []).append(line.metrics["accuracy"])
        retention.append(report.students[0].metrics["accuracy"] / teacher)
        click.echo(
            f"seed {seed}: " + ", ".join(f"{line.name} {line.metrics['accuracy']:.1%}" for line in report.students)
        )
    print_summary(teacher, accuracy, retention)
    Path(output, "students.json").write_text(
        json.dumps({"teacher": teacher, "accuracy": accuracy, "retention": retention}, indent=1) + "\n"
    )


def print_summary(teacher: float, accuracy: dict[str, list[float]], retention: list[float]) -> None:
    """Means over the seeds, and the gains over each control, in points of accuracy."""
    click.echo(f"\nteacher {teacher:.1%}; test accuracy, mean over {len(retention)} seeds:")
    for name, values in accuracy.items():
        click.echo(f"  {name:<24} {np.mean(values):.1%}")
    student, *controls = accuracy
    for control in controls:
        gain = np.subtract(accuracy[student], accuracy[control])
        interval = paired_mean_interval(gain)
        click.echo(
            f"gain over {control}: {gain.mean() * 100:+.1f} points, 95% interval {interval.low * 100:+.1f} to {interval.high * 100:+.1f}"
        )
    interval = paired_mean_interval(np.asarray(retention))
    click.echo(f"retention: {np.mean(retention):.1%}, 95% interval {interval.low:.1%} to {interval.high:.1%}")


if __name__ == "__main__":
    main()
