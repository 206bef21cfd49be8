"""The application that the commands belong to, the console that they write to, and its progress bar."""

import sys

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prune language models by convex optimization.",
)
console = Console(width=None if sys.stdout.isatty() else 160)  # a table in a file is not to be cut


@app.callback()
def _main() -> None:
    """Prune language models by convex optimization, every solve certified by a duality gap."""


def progress_bar() -> Progress:
    """What is being done, how much of it is done, and how long it has taken."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)
