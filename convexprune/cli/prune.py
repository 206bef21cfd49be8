"""`convexprune prune` and `convexprune eval`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from convexprune.cli import options
from convexprune.cli.application import app, console, progress_bar, show
from convexprune.errors import require_at_least
from convexprune.report import OperatorReport


@app.command()
def prune(
    model: options.Model = None,
    solver: Annotated[str, typer.Option(help="Solver of the convex method: fista, admm, cvxpy, scipy.")] = "fista",
    method: Annotated[
        str,
        typer.Option(help="convex, admm, perspective, or a baseline: alps, fistapruner, magnitude, sparsegpt, wanda."),
    ] = "convex",
    preset: Annotated[str | None, typer.Option(help="fistapruner: the algorithm as published.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of zeros, 0.5 unless the pattern says.")] = None,
    pattern: Annotated[str, typer.Option(help="unstructured, or N:M (N non-zeros in M), as 2:4.")] = "unstructured",
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
        typer.Option(help="Rows of each operator whose error the report compares with a lower bound; 0: none."),
    ] = 2,
    targets: options.Targets = None,
    ignore: options.Ignore = None,
    error_correction: Annotated[
        float | None, typer.Option(help="0 to 1: how much of earlier errors to make up. Left out: by --prefix.")
    ] = None,
    correct: Annotated[
        str | None,
        typer.Option(
            help="What to make up for: what the outputs of each operator lack, or for the one that ends a layer "
            "those of the layer. Left out: layer; for fistapruner operator."
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
) -> None:
    """Prune a model and write it as an ordinary Hugging Face folder."""
    settings = dict(locals())
    from transformers.utils.logging import disable_progress_bar

    from convexprune import api

    disable_progress_bar()  # ours says more
    settings |= {"targets": targets or ["Linear"], "ignore": ignore or []}
    settings["output_dir"] = settings.pop("output")
    settings["evaluation"] = settings.pop("eval_text") or ("self" if dataset == "self" else None)
    try:
        with progress_bar() as progress:
            result = api.prune(**settings, progress=lambda total: _follow(progress, total))
    except KeyboardInterrupt:
        console.print(f"interrupted; what is finished is kept in {output}: go on with the same command and --resume")
        raise typer.Exit(130) from None
    report = result.report
    show(report.table())
    if report.short_of_tokens:
        console.print(
            f"{len(report.short_of_tokens)} operators of experts got fewer tokens than inputs: see the report"
        )
    for name, p in report.perplexity.items():
        console.print(f"perplexity {name:7s} {p['value']:.3f}  ({p['windows']} windows of {p['window']} tokens)")
    if report.largest_gap is not None:
        console.print(f"largest relative duality gap of a final solve: {report.largest_gap:.1e}")
    if report.median_bound_ratio is not None:
        console.print(f"least error that any pruning could have, over ours (median): {report.median_bound_ratio:.2f}")
    console.print(f"pruned model: {output.resolve()}  ({sum(report.seconds.values()):.0f} s)", soft_wrap=True)


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
    from convexprune.adapters import load, text_windows
    from convexprune.adapters.text_files import check_text
    from convexprune.pipeline.machine import default_device
    from convexprune.validation import perplexity

    require_at_least(2, window=window)
    require_at_least(1, max_windows=max_windows)
    place = default_device(device)
    check_text(text)
    loaded = load(model, device=place)
    p = perplexity(loaded.model, text_windows(text, loaded, window)[:max_windows])
    counted = f"{p.tokens} tokens predicted in {p.windows} windows of {p.window}, stride {p.stride}"
    console.print(f"perplexity {p.value:.3f}  ({counted})")


def _follow(progress: Progress, total: int) -> Callable[[OperatorReport], None]:
    task = progress.add_task("looking at the dense model", total=total)

    def tell(o: OperatorReport) -> None:
        gap = "" if o.gap is None else f"  gap {o.gap:.0e}"
        progress.update(task, advance=1, description=f"{o.name}  error {o.relative_error:.1e}{gap}  {o.seconds:.1f} s")

    return tell
