"""Write the demo's report over several seeds.

Runs `softlabel report` with all measurements, and writes its figure for docs/benchmarks.md.

    make report           (or: python -m benchmarks.report --seeds 3)

Seed 0 is the demo's own. The other students are trained as in `benchmarks.students`, unless that
benchmark has trained them already. The first student of the file is the student, and the others are
its controls.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from benchmarks.students import trained_students
from pipeline.cli import FUNCTIONS
from pipeline.config import ReportConfig, load_config
from pipeline.evaluation.report.report import report
from pipeline.evaluation.report.summary import summary
from pipeline.models.quiet import quiet_libraries
from pipeline.workflow import run as run_stages


@click.command()
@click.option("--config", default="data/bbc/demo.yaml", show_default=True, help="Run file of the demo.")
@click.option("--seeds", default=3, type=click.IntRange(1), show_default=True, help="How many seeds.")
@click.option(
    "--students", default="runs/bench-students", show_default=True, help="Where the other seeds' students go."
)
@click.option("--output", default="runs/report", show_default=True, help="Where the report goes.")
@click.option("--picture", default="docs/figures/report.png", show_default=True, help="Where its picture goes.")
def main(config: str, seeds: int, students: str, output: str, picture: str) -> None:
    """Train the missing students, write the report, and copy its figure."""
    quiet_libraries()
    file = load_config(config)
    run_stages(file, FUNCTIONS, through="train-student")
    named = [(Path(str(section["output"])).name, str(section["output"])) for section in file.sections["train-student"]]
    for seed in range(1, seeds):
        named += trained_students(file, students, seed).items()
    first = named[0][0]
    found = report(
        ReportConfig(
            cache=(str(file.sections["cache-logits"][0]["output"]),),
            teacher=str(file.sections["cache-logits"][0]["teacher"]),
            student=tuple(f"{name}={directory}" for name, directory in named if name == first),
            control=tuple(f"{name}={directory}" for name, directory in named if name != first),
            output=output,
            overwrite=True,
        )
    )
    shutil.copyfile(Path(output, "quality.png"), picture)
    click.echo(f"{summary(found)}\n\nkept in {output}/report.html; its picture in {picture}")


if __name__ == "__main__":
    main()
