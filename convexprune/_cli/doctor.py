"""`convexprune doctor`."""

from typing import TYPE_CHECKING, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from convexprune._cli.application import app, console, print_json, show
from convexprune._cli.options import AsJson, Quiet, also_called, with_settings
from convexprune._cli.progress import following
from convexprune._cli.stopping import stoppable
from convexprune._schema.functions import DOCTOR

if TYPE_CHECKING:
    from convexprune._doctor.checkup import Checkup

MARKS = {True: "passed", False: "FAILED", None: ""}


@app.command(context_settings=also_called(DOCTOR))
@with_settings(DOCTOR)
def doctor(settings: dict[str, Any], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Check that this machine computes right. Covers methods, kernels, and a small run, killed and resumed.

    Takes about a minute on a GPU. Ends with exit status 1 after a failed check.
    """
    with stoppable(), following(quiet=quiet):
        from transformers.utils.logging import disable_progress_bar

        from convexprune._doctor.checkup import doctor as checked

        disable_progress_bar()
        found = checked(**settings)
    if as_json:
        print_json(found.to_json())
    else:
        show(_table(found))
        for line in found.verdict():
            console.print(line, highlight=False, soft_wrap=True)
    if found.failed:
        raise typer.Exit(1)


def _table(found: "Checkup") -> Table:
    table = Table("check", "of", "", "measured", box=SIMPLE_HEAD, title=f"Doctor on {found.device}")
    before = ""
    for row in found.rows:
        table.add_row("" if row.check == before else row.check, row.case, MARKS[row.measured.passed], row.measured.said)
        before = row.check
    return table
