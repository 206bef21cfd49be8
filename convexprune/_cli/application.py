"""The application that the commands belong to, and the console that they write to."""

import json
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def dashed(name: str) -> str:
    """The `name` of an option or a command, whose words may be joined by underscores."""
    return name.replace("_", "-")


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": dashed,
    },
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


def print_json(value: Any) -> None:
    """Print one JSON object; numbers that are not finite are text, since JSON has none."""
    from convexprune.report import finite

    print(json.dumps(finite(value), indent=2, allow_nan=False))


def show(table: Table) -> None:
    """Print a table as wide as it is: where the terminal is narrower its lines wrap, and no number is cut."""
    table.width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    console.print(table, crop=False)
