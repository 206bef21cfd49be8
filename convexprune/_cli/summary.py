"""What a run came to, in the 80 columns of any terminal; the rest is in report.json."""

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from convexprune.report import Report

WIDTH = 80


def summary(report: "Report") -> Table:
    """The facts of a run and what it took, a row for each."""
    from convexprune._rendering.facts import costs, facts

    table = Table.grid(padding=(0, 2))
    table.width = WIDTH
    table.add_column(no_wrap=True)
    table.add_column()
    for fact in (*facts(report), *costs(report)):
        table.add_row(fact.name, fact.text)
    return table
