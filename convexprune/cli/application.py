"""The application that the commands belong to, the console that they write to, and its progress bar."""

import sys

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prune language models by convex optimization.",
)
console = Console(width=None if sys.stdout.isatty() else 160, markup=False)  # names and messages have brackets


@app.callback()
def _main() -> None:
    """Prune language models by convex optimization, every solve certified by a duality gap."""


def show(table: Table) -> None:
    """Print a table as wide as it is: where the terminal is narrower its lines wrap, and no number is cut."""
    table.width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    console.print(table, crop=False)


def progress_bar() -> Progress:
    """What is being done, how much of it is done, and how long it has taken."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)
