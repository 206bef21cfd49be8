"""`convexprune prune` and `convexprune eval`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from convexprune._cli.application import app, console, show
from convexprune._cli.options import with_settings
from convexprune._cli.progress import following
from convexprune._cli.stopping import stoppable
from convexprune._cli.summary import summary
from convexprune._schema.functions import EVALUATE, PRUNE


@app.command()
@with_settings(PRUNE, "model", output_dir=Path("pruned"))
def prune(
    settings: dict[str, Any],
    recipe: Annotated[
        Path | None,
        typer.Option(help="A recipe.yaml, or the folder of a run: prune as it says, but for what other options say."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print a line for each operator as well.")] = False,
) -> None:
    """Prune a model and write it as an ordinary Hugging Face folder."""
    if recipe is None and settings.get("dataset", "self") == "self":
        settings = {"evaluation": "self"} | settings
    with stoppable(settings["output_dir"]), following() as shown:
        from transformers.utils.logging import disable_progress_bar

        from convexprune._api import calls as api

        disable_progress_bar()  # ours says more
        result = api.prune(**settings, recipe=recipe, progress=shown.operators)
    assert result.output_dir is not None
    if verbose:
        show(result.report.table())
    console.print(summary(result.report, result.output_dir))
    console.print(f"pruned model: {result.output_dir.resolve()}  (every operator: report.json)", soft_wrap=True)


@app.command("eval")
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
