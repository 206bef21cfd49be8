"""`convexprune advise`."""

from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from convexprune._cli.application import app, console, print_json, show
from convexprune._cli.options import AsJson, Quiet, also_called, with_settings
from convexprune._cli.progress import following
from convexprune._cli.stopping import stoppable
from convexprune._schema.functions import ADVISE

if TYPE_CHECKING:
    from convexprune.validation import Advice


@app.command(context_settings=also_called(ADVISE))
@with_settings(ADVISE, "model")
def advise(settings: dict[str, Any], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Say which ways to a smaller or faster model reach a target. Shows measured costs, and the commands."""
    with stoppable(), following(quiet=quiet):
        from convexprune.validation._advice import advise as advised

        found = advised(**settings)
    if as_json:
        print_json(found.to_json())
        return
    show(_table(found))
    for line in found.verdict():
        console.print(line, highlight=False, soft_wrap=True)


def _table(found: "Advice") -> Table:
    heads = ("", "all files", "bits of operators", "of all", "in memory", "perplexity over dense", "from")
    table = Table(*heads, box=SIMPLE_HEAD)
    table.title = f"{found.model}: {found.nbytes / 1e6:,.0f} MB in 16 bits. Target: {found.target}"
    for each in found.ways:
        way, style = each.way, None if each.reaches else "dim"
        sizes = (f"{each.disk / 1e6:,.0f} MB", f"{way.disk:.2f}", f"{each.bits:.2f}", f"{each.memory / 1e6:,.0f} MB")
        table.add_row(way.name, *sizes, f"{way.times:.2f}", way.source, style=style)
    return table
