"""The commands that measure: advise, bench, compare, doctor, eval, verify."""

import shlex
import sys
from importlib import import_module
from typing import Annotated, Any

import typer

from convexprune._cli.application import console, print_json, show, working
from convexprune._cli.options import AsJson, Quiet, command
from convexprune._schema.functions import ADVISE, BENCH, COMPARE_SAMPLES, DOCTOR, EVALUATE, VERIFY
from convexprune.errors import install_hint


def _measure(function: str, settings: dict[str, Any], as_json: bool, quiet: bool) -> Any:
    """Call a function of the package, print the result as JSON or as tables and sentences, and return it."""
    with working(quiet):
        module, _, name = function.rpartition(".")
        result = getattr(import_module(f"convexprune.{module}"), name)(**settings)
    if as_json:
        print_json(result.to_json())
        return result
    for table in result.tables():
        show(table)
    for line in result.verdict():
        console.print(line, highlight=False, soft_wrap=True)
    return result


@command(ADVISE, "model")
def advise(settings: dict[str, Any], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Say which ways to a smaller or faster model reach a target. Shows measured costs, and the commands."""
    _measure("validation.advise", settings, as_json, quiet)


@command(BENCH, "model")
def bench(settings: dict[str, Any], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Time a model on this machine: dense, 8 and 4 bits, sparse. Covers a prompt and generation."""
    _measure("validation._bench.bench", settings, as_json, quiet)


@command(COMPARE_SAMPLES, "model")
def compare(settings: dict[str, Any], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Compare methods on the same tokens. Errors, perplexity, KL to the dense model, seconds, products, memory."""
    asked, _ = COMPARE_SAMPLES.read(settings)
    seeds, output, model = asked.seeds, asked.output, settings.pop("model", None)
    settings.pop("seeds", None)
    settings["command"] = shlex.join(["convexprune", *sys.argv[1:]])
    with working(quiet, output, "compare"):
        from convexprune import validation
        from convexprune._storage.staging import output_folder
        from convexprune.validation import _results as results
        from convexprune.validation import _samples as samples

        output = output_folder(output, model)
        settings |= {"model": model, "output": output}
        if len(seeds) == 1:
            result, table = validation.compare(**settings, seed=seeds[0]), results.table
        else:
            result, table = validation.compare_samples(**settings, seeds=seeds), samples.table
    if as_json:
        print_json(result | {"output_dir": str(output.resolve())})
        return
    show(table(result))
    if asked.plots is None and not results.will_draw(None):
        console.print(f"No plots were drawn: that needs matplotlib ({install_hint('plot')}).")
    console.print(f"The results, report.md first: {output.resolve()}", soft_wrap=True)


@command(DOCTOR)
def doctor(settings: dict[str, Any], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Check that this machine computes right. Covers methods, kernels, and a small run, killed and resumed.

    Takes about a minute on a GPU. Ends with exit status 1 after a failed check.
    """
    if _measure("_doctor.checkup.doctor", settings, as_json, quiet).failed:
        raise typer.Exit(1)


@command(EVALUATE, "model", name="eval")
def evaluate(settings: dict[str, Any], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Measure a model: perplexity, KL to the dense model, tasks.

    Perplexity is by the common convention and by the model's window. Tasks are of lm-eval.
    """
    _measure("validation.evaluate", settings, as_json, quiet)


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
    if not _measure("validation.verify", {"source": source, **settings}, as_json, quiet).passed:
        raise typer.Exit(1)
