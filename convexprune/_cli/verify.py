"""`convexprune verify`."""

from typing import Annotated, Any

import typer
from rich.text import Text

from convexprune._cli.application import app, console, show
from convexprune._cli.options import AsJson, Quiet, also_called, with_settings
from convexprune._cli.progress import following
from convexprune._cli.stopping import stoppable
from convexprune._schema.functions import VERIFY


@app.command(context_settings=also_called(VERIFY))
@with_settings(VERIFY)
def verify(
    settings: dict[str, Any],
    source: Annotated[str | None, typer.Argument(help="Model, or folder of a run. Left out: the bundled OPT.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check answers against three foreign solvers. Pruned weights are compared with a bound that no pruning can beat.

    A model is pruned as the settings say. A run has a recipe; --model and --dataset give new places. Ends with exit
    status 1 if a tolerance is missed.
    """
    with stoppable(), following(quiet=quiet) as shown:
        from transformers.utils.logging import disable_progress_bar

        from convexprune import validation

        disable_progress_bar()

        def verified(name: str) -> None:
            shown(f"verified {name}")

        result = validation.verify(source, on_operator=verified, **settings)
    if as_json:
        print(result.to_json())
    else:
        for table in result.tables():
            show(table)
        if result.note:
            console.print(result.note, soft_wrap=True)
        for fault in result.faults:
            console.print(Text.assemble(("missed", "bold red"), f": {fault}"), soft_wrap=True)
        verdict = ("passed", "bold green") if result.passed else ("failed", "bold red")
        figures = f"{len(result.comparisons)} problems; "
        if result.bounds:  # whole columns have none
            figures += f"median bound / error {result.median_ratio:.2f}, undamped {result.median_plain_ratio:.2f}; "
        figures += f"{result.seconds:.0f} s"
        console.print(Text.assemble(verdict, f": {figures}"), soft_wrap=True)
    if not result.passed:
        raise typer.Exit(1)
