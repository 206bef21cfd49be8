"""The commands that change a model, and what they need to know: prune, permute, inspect, list."""

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from convexprune._cli.application import app, console, print_json, show, working
from convexprune._cli.options import PRINTED, AsJson, Quiet, command
from convexprune._schema.functions import INSPECT, PERMUTE, PRUNE

if TYPE_CHECKING:
    from convexprune._api.result import PruneResult
    from convexprune.adapters import Inspection, Permutation, Permuted
    from convexprune.report import Report

WIDTH = 80  # columns of a terminal


@command(PRUNE, "model", output_dir=Path("pruned"))
def prune(
    settings: dict[str, Any],
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="A recipe.yaml, or the folder of a run: prune as it says, but for what other options say.",
            rich_help_panel="run",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything, and say what would be done.", rich_help_panel="run"),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print a line for each operator as well.", rich_help_panel=PRINTED)
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prune a model and write it as an ordinary Hugging Face folder."""
    if recipe is None and settings.get("dataset", "self") == "self":
        settings = {"evaluation": "self"} | settings
    with working(quiet, settings["output_dir"], "prune"):
        from convexprune._api import calls as api

        call: Any = api.plan if dry_run else api.prune
        result = call(**settings, recipe=recipe)
    if dry_run:
        show_inspection(result, as_json)
    else:
        _show(result, as_json, verbose, settings.get("push_to_hub"))


def _show(result: "PruneResult", as_json: bool, verbose: bool, uploaded: str | None) -> None:
    assert result.output_dir is not None
    folder = result.output_dir.resolve()
    if as_json:
        print_json({"output_dir": str(folder), "report": json.loads(result.report.to_json())})
        return
    if verbose:
        show(result.report.table())
    console.print(summary(result.report))
    console.print(f"pruned model: {folder}  (a page of it: report.html)", soft_wrap=True)
    if uploaded is not None:
        console.print(f"uploaded: https://huggingface.co/{uploaded}", soft_wrap=True)


def summary(report: "Report") -> Table:
    """Return the facts and the costs of a run, a row for a fact; report.json has the rest."""
    from convexprune._rendering.facts import costs, facts

    table = Table.grid(padding=(0, 2))
    table.width = WIDTH
    table.add_column(no_wrap=True)
    table.add_column()
    for fact in (*facts(report), *costs(report)):
        table.add_row(fact.name, fact.text)
    return table


@command(PERMUTE, "model", output_dir=Path("permuted"))
def permute(settings: dict[str, Any], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Order the channels of a dense model so that N:M costs less. The model computes the same as before."""
    with working(quiet):
        from convexprune._api import calls as api

        result = api.permute(**settings)
    done, folder = result.permutation, result.output_dir
    assert folder is not None
    if as_json:
        print_json(done.to_dict() | {"output_dir": str(folder.resolve())})
        return
    show(_table_of_permutation(done))
    for name, why in done.left.items():
        console.print(f"left in their order: {name}: {why}", soft_wrap=True)
    console.print(f"permuted model: {folder.resolve()}", soft_wrap=True)


def _table_of_permutation(done: "Permutation") -> Table:
    table = Table("channels of", "sets", "each", "pruned share", "permuted", box=SIMPLE_HEAD)
    table.caption = "The share of W_ij^2 mean x_j^2 that the pattern prunes, before and after: less is better."
    kinds: dict[tuple[str, int], list[Permuted]] = defaultdict(list)
    for one in done.permuted:
        kinds[one.kind, one.channels.size].append(one)
    for (kind, size), alike in kinds.items():
        shares = [sum(each) / len(alike) for each in zip(*((one.before, one.after) for one in alike), strict=True)]
        table.add_row(kind, str(len(alike)), str(size), *(f"{share:.4f}" for share in shares))
    return table


@command(INSPECT, "model")
def inspect(settings: dict[str, Any], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Predict the work of pruning a model, from its config alone. Shows operators, memory, an estimate of the time.

    Not for channels, heads, layers and experts, which are found by weights: `prune --dry-run` reads them. Ends with
    exit status 1 if the device memory is not enough.
    """
    with working(quiet):
        from convexprune.adapters import inspect as inspect_model

        inspection = inspect_model(settings.pop("model", None), **settings)
    show_inspection(inspection, as_json)


def show_inspection(inspection: "Inspection", as_json: bool) -> None:
    """Print an inspection. Exit status 1 if the memory is not enough."""
    if as_json:
        print(inspection.to_json())
    else:
        for table in inspection.tables():
            console.print(table)
        for line in (*inspection.notes, *inspection.verdict()):
            console.print(line, highlight=False, soft_wrap=True)
    if not inspection.fits:
        raise typer.Exit(1)


@app.command("list")
def names(as_json: AsJson = False) -> None:
    """Families, solvers, methods, presets and patterns that there are."""
    from convexprune._schema.presets import PRESETS
    from convexprune.adapters import TESTED
    from convexprune.pruners import METHODS
    from convexprune.quantizers import QUANTIZERS
    from convexprune.recipe import SOLVERS
    from convexprune.solvers import make_solver, solver_names

    found: dict[str, Any] = {
        "families": list(TESTED.values()),
        "solvers": {name: [p.__name__ for p in make_solver(name).penalties] for name in solver_names()},
        "methods": sorted(METHODS),
        "presets": list(PRESETS),
        "patterns": ["unstructured", "N:M", "columns", "channels", "heads", "layers", "experts"],
        "quantizers": sorted(QUANTIZERS),
    }
    if as_json:
        print_json(found)
        return
    table = Table(box=None, show_header=False, padding=(0, 2))
    families = "; ".join(found["families"])  # some names have commas
    table.add_row("families", f"tested: {families}. Others are found out by watching them run, or refused")
    for number, (name, penalties) in enumerate(found["solvers"].items()):
        takes = ", ".join(_PENALTIES.get(each) or each for each in penalties)
        refits = {"Support", "AbstractPenalty"} & {*penalties}
        use = "prune --solver" if name in SOLVERS else f"{'refits' if refits else 'solve'}, not prune --solver"
        table.add_row("" if number else "solvers", f"{name}, for {use}; takes {takes}")
    for name in ("methods", "presets"):
        table.add_row(name, ", ".join(found[name]))
    table.add_row(
        "patterns",
        "unstructured (quota: matrix, row), N:M (N non-zeros in every M inputs, as 2:4), columns, channels, "
        "heads, layers, experts",
    )
    table.add_row("quantizers", f"{', '.join(found['quantizers'])}, for --quantize and --bits")
    console.print(table)


_PENALTIES = {"AbstractPenalty": "any penalty", "Support": "a fixed support", "GroupLasso": "group LASSO"}
