"""The commands that measure: advise, bench, compare, doctor, eval, verify."""

import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from convexprune._cli.application import console, print_json, show
from convexprune._cli.options import AsJson, Quiet, command
from convexprune._cli.stopping import working
from convexprune._schema.functions import ADVISE, BENCH, COMPARE_SAMPLES, DOCTOR, EVALUATE, VERIFY
from convexprune.errors import install_hint

if TYPE_CHECKING:
    from convexprune._doctor.checkup import Checkup
    from convexprune.validation import Advice
    from convexprune.validation._bench import Bench

MARKS = {True: "passed", False: "FAILED", None: ""}


@command(ADVISE, "model")
def advise(settings: dict[str, Any], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Say which ways to a smaller or faster model reach a target. Shows measured costs, and the commands."""
    with working(quiet):
        from convexprune.validation._advice import advise as advised

        advice = advised(**settings)
    if as_json:
        print_json(advice.to_json())
        return
    show(_table_of_advice(advice))
    for line in advice.verdict():
        console.print(line, highlight=False, soft_wrap=True)


def _table_of_advice(advice: "Advice") -> Table:
    heads = ("", "all files", "bits of operators", "of all", "in memory", "perplexity over dense", "from")
    table = Table(*heads, box=SIMPLE_HEAD)
    table.title = f"{advice.model}: {advice.nbytes / 1e6:,.0f} MB in 16 bits. Target: {advice.target}"
    for each in advice.ways:
        way, style = each.way, None if each.reaches else "dim"
        sizes = (f"{each.disk / 1e6:,.0f} MB", f"{way.disk:.2f}", f"{each.bits:.2f}", f"{each.memory / 1e6:,.0f} MB")
        table.add_row(way.name, *sizes, f"{way.times:.2f}", way.source, style=style)
    return table


@command(BENCH, "model")
def bench(settings: dict[str, Any], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Time a model on this machine: dense, 8 and 4 bits, sparse. Covers the largest layers and generation."""
    with working(quiet):
        from convexprune.validation._bench import bench as timed

        timings = timed(**settings)
    if as_json:
        print_json(timings.to_json())
        return
    for title, decoded in (("One weight", False), ("The whole model", True)):
        show(_table_of_timings(timings, title, decoded))
    for line in (*timings.verdict(), timings.line):
        console.print(line, highlight=False, soft_wrap=True)


def _table_of_timings(bench: "Bench", title: str, whole: bool) -> Table:
    what = "tokens/s" if whole else "ms"
    table = Table("", "batch", "format", what, "time over dense", "middle half", "rounds", "MB read", box=SIMPLE_HEAD)
    table.title = f"{title} of {bench.model} ({bench.zeros:.0%} zeros) on {bench.device}"
    for t in bench.timings:
        if (t.tokens_per_second is not None) == whole:
            number = f"{t.tokens_per_second:,.1f}" if t.tokens_per_second is not None else f"{t.milliseconds:.3f}"
            lower, upper = t.middle_half
            row = (t.what, str(t.batch), t.format, number, f"{t.over_dense:.2f}", f"{lower:.2f} to {upper:.2f}")
            table.add_row(*row, str(t.rounds), f"{t.nbytes / 1e6:,.1f}")
    return table


@command(COMPARE_SAMPLES, "model")
def compare(settings: dict[str, Any], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Compare methods on the same tokens. Errors, perplexity, KL to the dense model, seconds, products, memory."""
    asked, _ = COMPARE_SAMPLES.read(settings)
    seeds, output, model = asked.seeds, asked.output, settings.pop("model", None)
    settings.pop("seeds", None)
    settings["command"] = shlex.join(["convexprune", *sys.argv[1:]])
    with working(quiet, output, "compare"):
        from convexprune._storage.staging import output_folder
        from convexprune.validation import _results as results
        from convexprune.validation import _samples as samples
        from convexprune.validation import compare as compare_sample
        from convexprune.validation import compare_samples
        from convexprune.validation._plots import will_draw

        output = output_folder(output, model)
        settings |= {"model": model, "output": output}
        if len(seeds) == 1:
            result, table = compare_sample(**settings, seed=seeds[0]), results.table
        else:
            result, table = compare_samples(**settings, seeds=seeds), samples.table
    if as_json:
        print_json(result | {"output_dir": str(output.resolve())})
        return
    show(table(result))
    if asked.plots is None and not will_draw(None):
        console.print(f"No plots were drawn: that needs matplotlib ({install_hint('plot')}).")
    console.print(f"The results, report.md first: {output.resolve()}", soft_wrap=True)


@command(DOCTOR)
def doctor(settings: dict[str, Any], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Check that this machine computes right. Covers methods, kernels, and a small run, killed and resumed.

    Takes about a minute on a GPU. Ends with exit status 1 after a failed check.
    """
    with working(quiet):
        from convexprune._doctor.checkup import doctor as checked

        checkup = checked(**settings)
    if as_json:
        print_json(checkup.to_json())
    else:
        show(_table_of_checkup(checkup))
        for line in checkup.verdict():
            console.print(line, highlight=False, soft_wrap=True)
    if checkup.failed:
        raise typer.Exit(1)


def _table_of_checkup(checkup: "Checkup") -> Table:
    table = Table("check", "of", "", "measured", box=SIMPLE_HEAD, title=f"Doctor on {checkup.device}")
    before = ""
    for row in checkup.rows:
        table.add_row("" if row.check == before else row.check, row.case, MARKS[row.measured.passed], row.measured.said)
        before = row.check
    return table


@command(EVALUATE, "model", name="eval")
def evaluate(settings: dict[str, Any], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Measure a model: perplexity, KL to the dense model, tasks.

    Perplexity is by the common convention and by the model's window. Tasks are of lm-eval.
    """
    with working(quiet):
        from convexprune.validation import evaluate as measured

        evaluation = measured(**settings)
    if as_json:
        print(evaluation.to_json())
        return
    for table in evaluation.tables():
        show(table)
    for line in evaluation.left_out:
        console.print(f"not measured: {line}", soft_wrap=True, highlight=False)


@command(VERIFY)
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
    with working(quiet):
        from convexprune import validation

        result = validation.verify(source, **settings)
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
