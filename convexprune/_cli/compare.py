"""`convexprune compare`."""

import shlex
import sys
from typing import Any

from convexprune._cli.application import app, console, print_json, show
from convexprune._cli.options import AsJson, Quiet, also_called, with_settings
from convexprune._cli.progress import following
from convexprune._cli.stopping import stoppable
from convexprune._schema.functions import COMPARE_SAMPLES
from convexprune.errors import install_hint


@app.command(context_settings=also_called(COMPARE_SAMPLES))
@with_settings(COMPARE_SAMPLES, "model")
def compare(settings: dict[str, Any], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Compare methods on the same tokens. Errors, perplexity, KL to the dense model, seconds, products, memory."""
    asked, _ = COMPARE_SAMPLES.read(settings)
    seeds, output, model = asked.seeds, asked.output, settings.pop("model", None)
    settings.pop("seeds", None)
    settings["command"] = shlex.join(["convexprune", *sys.argv[1:]])
    with stoppable(output, "compare"), following(quiet=quiet) as shown:
        from transformers.utils.logging import disable_progress_bar

        from convexprune._storage.staging import output_folder
        from convexprune.validation import _results as results
        from convexprune.validation import _samples as samples
        from convexprune.validation import compare as compare_sample
        from convexprune.validation import compare_samples
        from convexprune.validation._plots import will_draw

        disable_progress_bar()
        output = output_folder(output, model)
        settings |= {"model": model, "output": output, "progress": lambda total: shown("comparing", total)}
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
