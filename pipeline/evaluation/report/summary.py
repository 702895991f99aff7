"""The report for the terminal: the verdict and the table of quality."""

from __future__ import annotations

import textwrap

from pipeline.evaluation.records import Report
from pipeline.evaluation.report.sections import Table, quality_table


def summary(report: Report) -> str:
    """A few lines; the rest stands in the page."""
    answer = textwrap.fill(report.verdict.text, 110, break_long_words=False, break_on_hyphens=False)
    return f"{answer}\n\n{plain_table(quality_table(report))}"


def plain_table(table: Table) -> str:
    """A table in columns, its notes below."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
    rows = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    ]
    return "\n".join([table.caption, "", *rows, "", *(f"  {note}" for note in table.notes)])
