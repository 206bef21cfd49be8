"""`convexprune bench`."""

from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from convexprune._cli.application import app, console, print_json, show
from convexprune._cli.options import AsJson, Quiet, also_called, with_settings
from convexprune._cli.progress import following
from convexprune._cli.stopping import stoppable
from convexprune._schema.functions import BENCH

if TYPE_CHECKING:
    from convexprune.validation._bench import Bench


@app.command(context_settings=also_called(BENCH))
@with_settings(BENCH, "model")
def bench(settings: dict[str, Any], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Time a model on this machine: dense, 8 and 4 bits, sparse. Covers the largest layers and generation."""
    with stoppable(), following(quiet=quiet):
        from transformers.utils.logging import disable_progress_bar

        from convexprune.validation._bench import bench as timed

        disable_progress_bar()
        found = timed(**settings)
    if as_json:
        print_json(found.to_json())
        return
    for title, decoded in (("One weight", False), ("The whole model", True)):
        show(_table(found, title, decoded))
    for line in (*found.verdict(), found.line):
        console.print(line, highlight=False, soft_wrap=True)


def _table(found: "Bench", title: str, whole: bool) -> Table:
    what = "tokens/s" if whole else "ms"
    table = Table("", "batch", "format", what, "time over dense", "middle half", "rounds", "MB read", box=SIMPLE_HEAD)
    table.title = f"{title} of {found.model} ({found.zeros:.0%} zeros) on {found.device}"
    for t in found.timings:
        if (t.tokens_per_second is not None) == whole:
            number = f"{t.tokens_per_second:,.1f}" if t.tokens_per_second is not None else f"{t.milliseconds:.3f}"
            lower, upper = t.middle_half
            row = (t.what, str(t.batch), t.format, number, f"{t.over_dense:.2f}", f"{lower:.2f} to {upper:.2f}")
            table.add_row(*row, str(t.rounds), f"{t.nbytes / 1e6:,.1f}")
    return table
