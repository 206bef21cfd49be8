"""`convexprune prune` and `convexprune eval`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from convexprune._cli.application import app, console, print_json, show
from convexprune._cli.inspect import show_inspection
from convexprune._cli.options import PRINTED, AsJson, Quiet, also_called, with_settings
from convexprune._cli.progress import following
from convexprune._cli.stopping import stoppable
from convexprune._cli.summary import summary
from convexprune._schema.functions import EVALUATE, PRUNE
from convexprune._storage.place import beside


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
    if recipe is None and settings.get("dataset", "self") == "self":
        settings = {"evaluation": "self"} | settings
    folder = beside(settings["output_dir"]) if settings.get("overwrite") else settings["output_dir"]
    with stoppable(folder), following(quiet=quiet) as shown:
        from transformers.utils.logging import disable_progress_bar

        from convexprune._api import calls as api

        disable_progress_bar()  # ours says more
        plan = api.plan(**settings, recipe=recipe) if dry_run else None
        result = None if dry_run else api.prune(**settings, recipe=recipe, progress=shown.operators)
    if plan is not None:
        show_inspection(plan, as_json)
        return
    assert result is not None and result.output_dir is not None
    if as_json:
        report = json.loads(result.report.to_json())
        print_json({"output_dir": str(result.output_dir.resolve()), "report": report})
        return
    if verbose:
        show(result.report.table())
    console.print(summary(result.report))
    console.print(f"pruned model: {result.output_dir.resolve()}  (a page of it: report.html)", soft_wrap=True)
    if (name := settings.get("push_to_hub")) is not None:
        console.print(f"uploaded: https://huggingface.co/{name}", soft_wrap=True)


@app.command("eval", context_settings=also_called(EVALUATE))
@with_settings(EVALUATE, "model")
def evaluate(settings: dict[str, Any]) -> None:
    """Perplexity of a model on a text, with all that the number depends on."""
    own, shared = EVALUATE.read(settings)
    with stoppable(), following() as shown:
        from transformers.utils.logging import disable_progress_bar

        from convexprune._device.machine import default_device
        from convexprune.adapters import bundled_if_none, load, text_windows
        from convexprune.adapters._data.text_files import check_text
        from convexprune.validation import perplexity

        disable_progress_bar()
        place = default_device(shared.get("device", "auto"))
        check_text(own.text)
        shown("loading the model")
        loaded = load(bundled_if_none(shared)["model"], device=place)
        p = perplexity(loaded.model, text_windows(own.text, loaded, own.window)[: own.max_windows])
    counted = f"{p.tokens} tokens predicted in {p.windows} windows of {p.window}, stride {p.stride}"
    console.print(f"perplexity {p.value:.3f}  ({counted})")
