"""`convexprune compare`."""

import shlex
import sys
from typing import Any

from convexprune._cli.application import app, console, show
from convexprune._cli.options import with_settings
from convexprune._cli.progress import following
from convexprune._cli.stopping import stoppable
from convexprune._schema.functions import COMPARE_SAMPLES
from convexprune.errors import install_hint


@app.command()
@with_settings(COMPARE_SAMPLES, "model")
def compare(settings: dict[str, Any]) -> None:
    """Compare methods on the same tokens: errors, perplexity, KL to the dense model, seconds, products, memory."""
    asked, _ = COMPARE_SAMPLES.read(settings)
    seeds, output, model = asked.seeds, asked.output, settings.pop("model", None)
    settings.pop("seeds", None)
    settings["command"] = shlex.join(["convexprune", *sys.argv[1:]])
    with stoppable(output, "work/identity.json" if len(seeds) == 1 else f"seed-{seeds[0]}"), following() as shown:
        from transformers.utils.logging import disable_progress_bar

        from convexprune._storage.place import output_folder
        from convexprune.validation import _results as results
        from convexprune.validation import _samples as samples
        from convexprune.validation import compare as compare_sample
        from convexprune.validation import compare_samples
        from convexprune.validation._plots import will_draw

        disable_progress_bar()
        output = output_folder(output, model)
        settings |= {"model": model, "output": output, "progress": lambda total: shown("comparing", total)}
        if len(seeds) == 1:
            table = results.table(compare_sample(**settings, seed=seeds[0]))
        else:
            table = samples.table(compare_samples(**settings, seeds=seeds))
    show(table)
    if asked.plots is None and not will_draw(None):
        console.print(f"No plots were drawn: that needs matplotlib ({install_hint('plot')}).")
    console.print(f"The results, report.md first: {output.resolve()}", soft_wrap=True)
