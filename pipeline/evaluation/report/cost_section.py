"""The section on what models cost to run and when a cache pays off."""

from __future__ import annotations

from pipeline.evaluation.records import BreakEven, Cost, Report
from pipeline.evaluation.report.forms import parameters, size, spread_text
from pipeline.evaluation.report.parts import Section, Table
from pipeline.tasks import get_task


def cost_section(report: Report) -> Section:
    """The section on speed, memory, energy, break-even and training time."""
    measured = report.machine is not None
    in_bytes = report.machine is not None and report.machine.bytes_per_row is not None
    header = ["", "parameters", "bytes on disk"]
    if measured:
        header += [
            "one row, ms",
            "rows a second",
            "faster, one row",
            "faster, batched",
            "peak memory",
            "J / 1,000",
        ]
        header += ["KB of text a second"] * in_bytes
    rows = [
        (
            cost.name,
            parameters(cost.num_parameters),
            "-" if cost.disk_bytes is None else size(cost.disk_bytes),
            *(_measured_cost(cost) if measured else ()),
            *([spread_text(cost.bytes_per_second, 1e-3, ",.1f")] if in_bytes else []),
        )
        for cost in report.costs
    ]
    notes = []
    if report.machine is not None:
        machine = report.machine
        each = f"{machine.bytes_per_row:,} bytes of text" if in_bytes else f"{machine.tokens} tokens"
        of_images = get_task(report.task).reads == "images"
        rows_of = "images, one" if of_images else f"rows of {each} on average, one"
        notes = [
            f"medians, in brackets the quartiles, of {machine.rounds} rounds after one to warm up; models take turns in each round, in processes of their own",
            f"{machine.device}, {machine.threads} thread(s), float32; {rows_of} by one or {machine.batch_rows} in a batch; {'decoding and resizing are' if of_images else 'tokenization is'} not timed",
            "faster: the teacher's seconds over the model's, round by round; peak memory: resident while it runs, above that of the process before it loaded the model",
            f"J / 1,000: joules for 1,000 rows in batches, {machine.energy}",
        ]
    tables = [Table("Running a model", tuple(header), tuple(rows), tuple(notes))]
    if report.break_even:
        tables.append(
            Table(
                "The cache against a teacher in the loop",
                ("", "bytes", "capture", "teacher, one pass", "pays for itself after", "passes made here", "saved"),
                tuple(_break_even_row(item) for item in report.break_even),
                (
                    "of the training split; a pass is one epoch of one student, in each of which a teacher in the loop would run over every row again",
                    "measured where the cache was made; decoding the cache, and the memory of a teacher in the loop, are left out",
                ),
            )
        )
    runs = [(model.name, run) for model in report.models for run in model.runs if run.steps is not None]
    if runs:
        tables.append(
            Table(
                "Training",
                ("", "seed", "steps", "passes", "seconds"),
                tuple(
                    (
                        name,
                        str(run.seed),
                        f"{run.steps:,}",
                        "-" if run.passes is None else f"{run.passes:.1f}",
                        "-" if run.seconds is None else f"{run.seconds:,.0f}",
                    )
                    for name, run in runs
                ),
            )
        )
    return Section("cost", "Cost", (), tuple(tables))


def _measured_cost(cost: Cost) -> tuple[str, ...]:
    return (
        spread_text(cost.latency, 1000, ".1f"),
        spread_text(cost.throughput, 1, ",.0f"),
        spread_text(cost.speedup, 1, ".1f", "x"),
        spread_text(cost.speedup_batched, 1, ".1f", "x"),
        "-" if cost.peak_bytes is None else size(cost.peak_bytes),
        "-" if cost.joules_per_thousand is None else f"{cost.joules_per_thousand:.1f}",
    )


def _break_even_row(item: BreakEven) -> tuple[str, ...]:
    return (
        item.cache,
        size(item.cache_bytes),
        f"{item.capture_seconds:.1f} s on {item.device}",
        f"{item.pass_seconds:.1f} s",
        f"{item.passes:.2f} passes",
        "-" if item.passes_made is None else f"{item.passes_made:.1f}",
        "-" if item.saved_seconds is None else f"{item.saved_seconds:,.0f} s",
    )
