"""`convexprune prune`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convexprune._cli.application import app, console, print_json, show
from convexprune._cli.inspect import show_inspection
from convexprune._cli.options import PRINTED, AsJson, Quiet, also_called, with_settings
from convexprune._cli.progress import following
from convexprune._cli.stopping import stoppable
from convexprune._cli.summary import summary
from convexprune._schema.functions import PRUNE

if TYPE_CHECKING:
    from convexprune._api.result import PruneResult


@app.command(context_settings=also_called(PRUNE))
@with_settings(PRUNE, "model", output_dir=Path("pruned"))
def prune(
    settings: dict[str, Any],
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="A recipe.yaml, or the folder of a run: prune as it says, but for what other options say.",
            rich_help_panel="run",
        ),
    ] = None,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            help="Measure perplexity before and after, and KL from dense: on the held-out samples, or on --eval-text.",
            rich_help_panel="run",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check everything, say what would be done, and do nothing.", rich_help_panel="run"
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print a line for each operator as well.", rich_help_panel=PRINTED)
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prune a model and write it as an ordinary Hugging Face folder."""
    if evaluate:
        settings = {"evaluation": "held-out"} | settings
    if recipe is None and settings.get("dataset", "self") == "self":
        settings = {"evaluation": "self"} | settings
    with stoppable(settings["output_dir"], "prune"), following(quiet=quiet) as shown:
        from transformers.utils.logging import disable_progress_bar

        from convexprune._api import calls as api

        disable_progress_bar()  # ours says more
        plan = api.plan(**settings, recipe=recipe) if dry_run else None
        result = None if dry_run else api.prune(**settings, recipe=recipe, progress=shown.operators)
    if plan is not None:
        show_inspection(plan, as_json)
        return
    assert result is not None
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
