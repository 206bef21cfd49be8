"""`convexprune compare`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from convexprune.cli import options
from convexprune.cli.application import app, console, show
from convexprune.cli.progress import following
from convexprune.cli.stopping import stoppable
from convexprune.errors import PatternError, RecipeError, install_hint


@app.command()
def compare(
    model: options.Model = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Methods, or solvers of the convex method; settings as in sparsegpt:damping=0.1 or "
            "fista:convention=pruned-layer."
        ),
    ] = "fista,sparsegpt,wanda,magnitude",
    sparsity: Annotated[str, typer.Option(help="Shares of zeros, for unstructured.")] = "0.5",
    pattern: Annotated[str, typer.Option(help="unstructured, N:M.")] = "unstructured",
    convention: Annotated[
        str,
        typer.Option(
            help="own, or one for all: dense, dense-half, dense-none, dense-layer, pruned-own, pruned-half, "
            "pruned-dense, pruned-layer."
        ),
    ] = "own",
    allocation: Annotated[
        str,
        typer.Option(
            help="own (what prune takes if it is left out), or one for all: uniform, rows, curve, half-curve, owl, "
            "skewness."
        ),
    ] = "own",
    quota: Annotated[
        str,
        typer.Option(help="Where the share of zeros holds: own (of wanda each row, else the matrix), matrix or row."),
    ] = "own",
    dataset: options.Dataset = "self",
    num_calibration_samples: options.Samples = 64,
    held_out_samples: options.HeldOut = None,
    max_seq_length: options.Length = None,
    batch_size: options.BatchSize = 1,
    seed: Annotated[
        str, typer.Option(help="Of the choice of samples; of several, 0,1,2, each is compared, and the means are told.")
    ] = "0",
    eval_text: Annotated[
        list[str] | None,
        typer.Option(help="A file, python-docs or licences; repeat it for more. Left out: the last two."),
    ] = None,
    eval_window: Annotated[int | None, typer.Option(help="Tokens a window; 1024, or the model's limit.")] = None,
    eval_windows: Annotated[int, typer.Option(help="The first so many windows of each text; 0: all.")] = 20,
    targets: options.Targets = None,
    ignore: options.Ignore = None,
    device: options.Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32",
    output: options.Output = Path("compared"),
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted comparison.")] = False,
    plots: Annotated[bool | None, typer.Option(help="Draw the results. Left out: if matplotlib is installed.")] = None,
) -> None:
    """Compare methods on the same tokens: errors, perplexity, KL to the dense model, seconds, products, memory."""
    settings = dict(locals())
    lists = {"methods": "methods", "sparsity": "sparsities", "pattern": "patterns", "convention": "conventions"}
    lists |= {"allocation": "allocations", "seed": "seeds"}
    settings |= {plural: settings.pop(name).split(",") for name, plural in lists.items()}
    settings["sparsities"] = [_share(text) for text in settings["sparsities"]]
    seeds = [_seed(text) for text in settings.pop("seeds")]
    settings |= {"targets": targets or ["Linear"], "ignore": ignore or []}
    settings |= {"eval_windows": eval_windows or None, "command": shlex.join(["convexprune", *sys.argv[1:]])}
    texts = settings.pop("eval_text")
    if texts:
        settings["eval_texts"] = texts
    with stoppable(output, "work/identity.json" if len(seeds) == 1 else f"seed-{seeds[0]}"), following() as shown:
        from transformers.utils.logging import disable_progress_bar

        from convexprune.pipeline.place import output_folder
        from convexprune.validation import compare as compare_sample
        from convexprune.validation import compare_samples, results, samples
        from convexprune.validation.plots import will_draw

        disable_progress_bar()
        settings |= {"output": output_folder(output, model), "progress": lambda total: shown("comparing", total)}
        if len(seeds) == 1:
            table = results.table(compare_sample(**settings, seed=seeds[0]))
        else:
            table = samples.table(compare_samples(**settings, seeds=seeds))
    show(table)
    if plots is None and not will_draw(plots):
        console.print(f"No plots were drawn: that needs matplotlib ({install_hint('plot')}).")
    console.print(f"The results, report.md first: {settings['output'].resolve()}", soft_wrap=True)


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PatternError(f"Sparsity {text!r} is no number: it is the share of zeros, 0.5 for half.") from None


def _seed(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise RecipeError(f"Seed {text!r} is no whole number: give one, or several as in 0,1,2.") from None
