"""The application that the commands belong to, and the console that they write to."""

import sys
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(width=None if sys.stdout.isatty() else 160, markup=False)  # names and messages have brackets


def _version(asked: bool) -> None:
    if asked:
        print(version("convexprune"))
        raise typer.Exit


@app.callback()
def _main(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it, and end.")] = False,
) -> None:
    """Prune language models by convex optimization. Begin with: convexprune prune (a small bundled model, a minute)."""


def show(table: Table) -> None:
    """Print a table as wide as it is: where the terminal is narrower its lines wrap, and no number is cut."""
    table.width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    console.print(table, crop=False)
