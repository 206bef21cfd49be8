"""`convexprune inspect` and `convexprune list`."""

from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from convexprune._cli.application import app, console, print_json
from convexprune._cli.options import AsJson, Quiet, also_called, with_settings
from convexprune._cli.progress import following
from convexprune._cli.stopping import stoppable
from convexprune._schema.functions import INSPECT

if TYPE_CHECKING:
    from convexprune.adapters._inspection.inspection import Inspection


@app.command(context_settings=also_called(INSPECT))
@with_settings(INSPECT, "model")
def inspect(settings: dict[str, Any], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Predict the work of pruning a model, from its config alone. Shows operators, memory, an estimate of the time.

    Ends with exit status 1 if the device memory is not enough.
    """
    with stoppable(), following(quiet=quiet):
        from convexprune.adapters._inspection.inspection import inspect as inspect_model

        found = inspect_model(settings.pop("model", None), **settings)
    show_inspection(found, as_json)


def show_inspection(found: "Inspection", as_json: bool) -> None:
    """Print an inspection. Exit status 1 if the memory is not enough."""
    if as_json:
        print(found.to_json())
    else:
        for table in found.tables():
            console.print(table)
        for line in (*found.notes, *found.verdict()):
            console.print(line, highlight=False, soft_wrap=True)
    if not found.fits:
        raise typer.Exit(1)


@app.command("list")
def names(as_json: AsJson = False) -> None:
    """Families, solvers, methods, presets and patterns that there are."""
    from convexprune.adapters import TESTED
    from convexprune.pruners import METHODS
    from convexprune.quantizers import QUANTIZERS
    from convexprune.recipe import PRESETS, SOLVERS
    from convexprune.solvers import make_solver, solver_names

    if as_json:
        print_json(
            {
                "families": list(TESTED.values()),
                "solvers": {name: [p.__name__ for p in make_solver(name).penalties] for name in solver_names()},
                "methods": sorted(METHODS),
                "presets": list(PRESETS),
                "patterns": ["unstructured", "N:M", "columns", "channels", "heads", "layers", "experts"],
                "quantizers": sorted(QUANTIZERS),
            }
        )
        return
    table = Table(box=None, show_header=False, padding=(0, 2))
    families = "; ".join(TESTED.values())  # some names have commas
    table.add_row("families", f"tested: {families}. Others are found out by watching them run, or refused")
    for number, name in enumerate(solver_names()):
        takes = ", ".join(_PENALTIES.get(each, each) for each in (p.__name__ for p in make_solver(name).penalties))
        use = "prune --solver" if name in SOLVERS else "refits, not prune --solver"
        table.add_row("" if number else "solvers", f"{name}, for {use}; takes {takes}")
    table.add_row("methods", ", ".join(sorted(METHODS)))
    table.add_row("presets", ", ".join(PRESETS))
    table.add_row(
        "patterns",
        "unstructured (quota: matrix, row), N:M (N non-zeros in every M inputs, as 2:4), columns, channels, "
        "heads, layers, experts",
    )
    table.add_row("quantizers", f"{', '.join(sorted(QUANTIZERS))}, for --quantize and --bits")
    console.print(table)


_PENALTIES = {"AbstractPenalty": "any penalty", "Support": "a fixed support", "GroupLasso": "group LASSO"}
