"""The result of a run in the 80 columns of a terminal; report.json has the rest."""

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from convexprune.report import Report

WIDTH = 80


def summary(report: "Report") -> Table:
    from convexprune._rendering.facts import costs, facts

    table = Table.grid(padding=(0, 2))
    table.width = WIDTH
    table.add_column(no_wrap=True)
    table.add_column()
    for fact in (*facts(report), *costs(report)):
        table.add_row(fact.name, fact.text)
    return table
