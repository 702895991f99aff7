"""The report for the terminal: the verdict and the table of quality."""

from __future__ import annotations

import textwrap

from pipeline.evaluation.records import Report
from pipeline.evaluation.report.parts import Table
from pipeline.evaluation.report.sections import quality_table
from pipeline.evaluation.table import aligned


def summary(report: Report) -> str:
    """The verdict and the table of quality as text."""
    answer = textwrap.fill(report.verdict.text, 110, break_long_words=False, break_on_hyphens=False)
    return f"{answer}\n\n{plain_table(quality_table(report))}"


def plain_table(table: Table) -> str:
    """Format a table in aligned columns, with its notes below."""
    rows = aligned([table.header, *table.rows])
    return "\n".join([table.caption, "", *rows, "", *(f"  {note}" for note in table.notes)])
