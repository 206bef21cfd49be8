"""`convexprune prune` and `convexprune eval`."""

from pathlib import Path
from typing import Annotated

import typer

from convexprune.cli import options
from convexprune.cli.application import app, console, show
from convexprune.cli.progress import following
from convexprune.cli.stopping import stoppable
from convexprune.cli.summary import summary
from convexprune.errors import require_at_least


@app.command()
def prune(
    model: options.Model = None,
    solver: Annotated[
        str,
        typer.Option(
            help="Solver of the convex method: fista, admm; for very small models cvxpy, scipy (minutes each)."
        ),
    ] = "fista",
    method: Annotated[
        str,
        typer.Option(help="convex, admm, or a baseline: alps, fistapruner, magnitude, sparsegpt, wanda."),
    ] = "convex",
    preset: Annotated[str | None, typer.Option(help="fistapruner: the algorithm as published.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of zeros, 0.5 unless the pattern says.")] = None,
    pattern: Annotated[
        str, typer.Option(help="unstructured, N:M (N non-zeros in M), as 2:4, columns, or int8.")
    ] = "unstructured",
    quota: options.Quota = "matrix",
    allocation: options.Allocation = None,
    dataset: options.Dataset = "self",
    num_calibration_samples: options.Samples = 128,
    held_out_samples: options.HeldOut = None,
    max_seq_length: options.Length = None,
    batch_size: options.BatchSize = 1,
    seed: options.Seed = 0,
    bound_rows: Annotated[
        int,
        typer.Option(
            help="Rows of each operator (all, if it has fewer) whose error is compared with a lower bound; 0: none."
        ),
    ] = 2,
    targets: options.Targets = None,
    ignore: options.Ignore = None,
    error_correction: Annotated[
        float | None, typer.Option(help="0 to 1: how much of earlier errors to make up. Left out: by --prefix.")
    ] = None,
    correct: Annotated[
        str | None,
        typer.Option(
            help="Which error to make up for: operator, that of its own outputs; or layer, of the operator that ends a "
            "decoder layer that of the layer's outputs. Left out: layer; for fistapruner operator."
        ),
    ] = None,
    prefix: Annotated[str, typer.Option(help="What feeds a decoder layer: dense or pruned.")] = "dense",
    damping: Annotated[
        float | None,
        typer.Option(
            help="Of convex, admm or an added --refit: pull to the dense weight, relative to the diagonal of the Gram "
            "matrix. Left out: from the noise of the sample."
        ),
    ] = None,
    refit: Annotated[
        bool | None, typer.Option(help="Least squares on the support, for any method or for none.")
    ] = None,
    device: options.Device = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16. Left out: as stored, of the bundled OPT float32."),
    ] = None,
    eval_text: Annotated[
        str | None,
        typer.Option(
            help="A .txt or .jsonl file whose perplexity to print, before and after. Left out: text that the model "
            "writes itself, if --dataset is self; else none."
        ),
    ] = None,
    output: options.Output = Path("pruned"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in the folder.")] = False,
    executor: Annotated[str, typer.Option(help="Who prunes: serial, pool, ranks (torchrun, srun) or ray.")] = "serial",
    workers: Annotated[
        int | None,
        typer.Option(help="Processes of pool, tasks of ray. Left out: one a GPU, or as many as cores have room for."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="That a layer is pruned on; the last bits depend on it. Left out: torch's, divided by the workers."
        ),
    ] = None,
    trust_remote_code: options.RemoteCode = False,
    allow_pickle: Annotated[bool, typer.Option(help="Read pickled checkpoints, which can run code.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print a line for each operator as well.")] = False,
) -> None:
    """Prune a model and write it as an ordinary Hugging Face folder."""
    settings = dict(locals())
    del settings["verbose"]
    settings |= {"targets": targets or ["Linear"], "ignore": ignore or []}
    settings["output_dir"] = settings.pop("output")
    settings["evaluation"] = settings.pop("eval_text") or ("self" if dataset == "self" else None)
    with stoppable(output), following() as shown:
        from transformers.utils.logging import disable_progress_bar

        from convexprune import api

        disable_progress_bar()  # ours says more
        result = api.prune(**settings, progress=shown.operators)
    assert result.output_dir is not None
    if verbose:
        show(result.report.table())
    console.print(summary(result.report, result.output_dir))
    console.print(f"pruned model: {result.output_dir.resolve()}  (every operator: report.json)", soft_wrap=True)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or hub name.")],
    text: Annotated[Path, typer.Option(help="A .txt or .jsonl file.")],
    window: Annotated[
        int | None, typer.Option(help="Tokens a window; they do not overlap. Left out: 1024, or the model's limit.")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(help="Only the first so many windows. Left out: all.")] = None,
    device: options.Device = "auto",
) -> None:
    """Perplexity of a model on a text, with all that the number depends on."""
    require_at_least(2, window=window)
    require_at_least(1, max_windows=max_windows)
    with stoppable(), following() as shown:
        from transformers.utils.logging import disable_progress_bar

        from convexprune.adapters import load, text_windows
        from convexprune.adapters.text_files import check_text
        from convexprune.pipeline.machine import default_device
        from convexprune.validation import perplexity

        disable_progress_bar()
        place = default_device(device)
        check_text(text)
        shown("loading the model")
        loaded = load(model, device=place)
        p = perplexity(loaded.model, text_windows(text, loaded, window)[:max_windows])
    counted = f"{p.tokens} tokens predicted in {p.windows} windows of {p.window}, stride {p.stride}"
    console.print(f"perplexity {p.value:.3f}  ({counted})")
