"""`convexprune eval`."""

from typing import Any

from convexprune._cli.application import app, console, show
from convexprune._cli.options import AsJson, Quiet, also_called, with_settings
from convexprune._cli.progress import following
from convexprune._cli.stopping import stoppable
from convexprune._schema.functions import EVALUATE


@app.command("eval", context_settings=also_called(EVALUATE))
@with_settings(EVALUATE, "model")
def evaluate(settings: dict[str, Any], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Measure a model: perplexity, KL to the dense model, tasks.

    Perplexity is by the common convention and by the model's window. Tasks are of lm-eval.
    """
    with stoppable(), following(quiet=quiet):
        from transformers.utils.logging import disable_progress_bar

        from convexprune.validation import evaluate as measured

        disable_progress_bar()
        found = measured(**settings)
    if as_json:
        print(found.to_json())
        return
    for table in found.tables():
        show(table)
    for line in found.left_out:
        console.print(f"not measured: {line}", soft_wrap=True, highlight=False)
