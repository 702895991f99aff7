"""Configuration of report."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config.options import check_positive, data_option, machine_option, model_option, output_option
from pipeline.errors import MisuseError


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """Answer on one page whether students perform as well as their teacher."""

    cache: tuple[str, ...] = data_option(
        "Directory of the cache; repeat where students were trained from several: their rows are the same, their teachers differ."
    )
    student: tuple[str, ...] = model_option(
        "Student directory, or NAME=DIR; repeat for several. The same NAME again is another seed of that student."
    )
    control: tuple[str, ...] = model_option("As --student: what students are compared with.", ())
    teacher: str | None = model_option(
        "Directory of the (first cache's) teacher, to measure its speed and memory; its metrics come from the cache.",
        None,
    )
    split: str = data_option("Split to report on.", "test")
    calibration_split: str | None = data_option(
        "Split that temperatures are fitted on and the headline student is chosen on. Default: validation, where there is one; without it temperatures are fitted crosswise on halves of --split.",
        None,
    )
    output: str = output_option("Directory for report.html, report.json, report.md and the figures.")
    batch_size: int | None = machine_option(
        "Rows per forward pass. Default: 32 (classification), 4 (language models).", None
    )
    rounds: int = machine_option(
        "Rounds of the speed measurement, models taking turns in each; 0: measure no speed, memory and energy.", 10
    )
    threads: int | None = machine_option("Threads of the speed measurement. Default: as many as PyTorch takes.", None)
    watts: float = machine_option(
        "Power of one busy core, for the energy where the machine's meter (RAPL) cannot be read.", 10.0
    )
    resamples: int = output_option("Resamples of each bootstrap.", 2000)
    seed: int = output_option("Seed of the bootstrap and of the permutation tests.", 0)
    examples: int = output_option("Rows or positions to show where student and teacher differ most; 0: none.", 5)
    overwrite: bool = output_option("Replace the report that the output directory holds.", False)
    json: bool = output_option("Print report.json instead of a table.", False)

    def __post_init__(self) -> None:
        for name in ("cache", "student", "control"):  # Python callers may give a single string
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        if not self.cache:
            raise MisuseError("--cache: expected at least one directory")
        if not self.student:
            raise MisuseError("--student: expected at least one directory")
        check_positive("--batch-size", self.batch_size)
        check_positive("--threads", self.threads)
        if self.resamples < 100:
            raise MisuseError(f"--resamples: expected at least 100, found {self.resamples}")
        if self.rounds < 0 or self.examples < 0:
            raise MisuseError(f"--rounds and --examples: expected at least 0, found {self.rounds} and {self.examples}")
        if not 0 < self.watts < math.inf:
            raise MisuseError(f"--watts: expected above 0, found {self.watts}")
        if self.calibration_split == self.split:
            raise MisuseError(
                f"--calibration-split {self.split}: is the split that is reported; temperatures fitted there would flatter it: name another, or none"
            )
