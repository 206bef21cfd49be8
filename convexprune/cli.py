"""The command line, thin over the Python functions of the same names."""

import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from convexprune.errors import ConvexpruneError, PatternError
from convexprune.report import OperatorReport

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prune language models by convex optimization.",
)
console = Console(width=None if sys.stdout.isatty() else 160)  # a table in a file is not to be cut


@app.callback()
def _main() -> None:
    """Prune language models by convex optimization, every solve certified by a duality gap."""


@app.command()
def prune(
    model: Annotated[str | None, typer.Argument(help="Folder or hub name. Left out: the small bundled OPT.")] = None,
    solver: Annotated[str, typer.Option(help="Solver of the convex method: fista, cvxpy, scipy.")] = "fista",
    method: Annotated[
        str, typer.Option(help="convex, admm, or a baseline: alps, sparsegpt, wanda, magnitude.")
    ] = "convex",
    preset: Annotated[str | None, typer.Option(help="fistapruner: the algorithm as published.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of zeros, 0.5 unless the pattern says.")] = None,
    pattern: Annotated[str, typer.Option(help="unstructured, or N:M (N non-zeros in M), as 2:4.")] = "unstructured",
    quota: Annotated[str, typer.Option(help="Where the share of zeros holds: matrix or row.")] = "matrix",
    dataset: Annotated[str, typer.Option(help="self, c4, wikitext2, ptb, or a .txt or .jsonl file.")] = "self",
    num_calibration_samples: Annotated[int, typer.Option("--num-calibration-samples", "--nsamples")] = 128,
    held_out_samples: Annotated[int | None, typer.Option(help="Samples to judge by only; an eighth as many.")] = None,
    max_seq_length: Annotated[int | None, typer.Option("--max-seq-length", "--seqlen", help="Tokens a sample.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the choice of samples.")] = 0,
    targets: Annotated[
        list[str] | None, typer.Option(help="Operators to prune, all unless given; repeat it for more.")
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Operators to leave alone; repeat it for more.")] = None,
    error_correction: Annotated[float, typer.Option(help="0 to 1: how much of earlier errors to make up.")] = 1.0,
    prefix: Annotated[str, typer.Option(help="What feeds a decoder layer: dense or pruned.")] = "dense",
    damping: Annotated[float | None, typer.Option(help="Pull to the dense weight. Left out: from the data.")] = None,
    refit: Annotated[
        bool | None, typer.Option(help="Least squares on the support, for any method or for none.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16. Left out: as stored.")] = None,
    eval_text: Annotated[str | None, typer.Option(help="A text whose perplexity to print, before and after.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the result; must be empty or not there.")] = Path("pruned"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in the folder.")] = False,
    executor: Annotated[str, typer.Option(help="Who prunes: serial, pool, ranks (torchrun, srun) or ray.")] = "serial",
    workers: Annotated[
        int | None, typer.Option(help="Of pool and ray. Left out: one a GPU, or as cores allow.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="That a layer is pruned on; the last bits depend on it.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that the checkpoint brings.")] = False,
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
        with _progress() as progress:
            result = api.prune(**settings, progress=lambda total: _follow(progress, total))
    except KeyboardInterrupt:
        console.print(f"interrupted; what is finished is kept in {output}: go on with the same command and --resume")
        raise typer.Exit(130) from None
    report = result.report
    console.print(report.table())
    if report.short_of_tokens:
        console.print(
            f"{len(report.short_of_tokens)} operators of experts got fewer tokens than inputs: see the report"
        )
    for name, p in report.perplexity.items():
        console.print(f"perplexity {name:7s} {p['value']:.3f}  ({p['windows']} windows of {p['window']} tokens)")
    if report.largest_gap is not None:
        console.print(f"largest relative duality gap of a final solve: {report.largest_gap:.1e}")
    console.print(f"pruned model: {output.resolve()}  ({sum(report.seconds.values()):.0f} s)", soft_wrap=True)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or hub name.")],
    text: Annotated[Path, typer.Option(help="A .txt or .jsonl file.")],
    window: Annotated[int, typer.Option(help="Tokens a window; windows do not overlap.")] = 1024,
    max_windows: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    device: Annotated[str, typer.Option()] = "auto",
) -> None:
    """Perplexity of a model on a text, with all that the number depends on."""
    from convexprune.adapters import load, text_windows
    from convexprune.pipeline.machine import default_device
    from convexprune.validation import perplexity

    loaded = load(model, device=default_device(device))
    p = perplexity(loaded.model, text_windows(text, loaded, window)[:max_windows])
    counted = f"{p.tokens} tokens predicted in {p.windows} windows of {p.window}, stride {p.stride}"
    console.print(f"perplexity {p.value:.3f}  ({counted})")


@app.command()
def compare(
    model: Annotated[str | None, typer.Argument(help="Folder or hub name. Left out: the small bundled OPT.")] = None,
    methods: Annotated[
        str, typer.Option(help="Methods, or solvers of the convex method; settings as in sparsegpt:damping=0.1.")
    ] = "fista,sparsegpt,wanda,magnitude",
    sparsity: Annotated[str, typer.Option(help="Shares of zeros, for unstructured.")] = "0.5",
    pattern: Annotated[str, typer.Option(help="unstructured, N:M.")] = "unstructured",
    convention: Annotated[
        str,
        typer.Option(help="own, dense, dense-half, dense-none, pruned-own, pruned-half, pruned-dense."),
    ] = "own",
    allocation: Annotated[str, typer.Option(help="uniform, curve, owl, skewness.")] = "uniform",
    quota: Annotated[str, typer.Option(help="Where the share of zeros holds: matrix or row.")] = "matrix",
    dataset: Annotated[str, typer.Option(help="self, c4, wikitext2, ptb, or a .txt or .jsonl file.")] = "self",
    num_calibration_samples: Annotated[int, typer.Option("--num-calibration-samples", "--nsamples")] = 64,
    held_out_samples: Annotated[int | None, typer.Option(help="Samples to judge by only; an eighth as many.")] = None,
    max_seq_length: Annotated[int | None, typer.Option("--max-seq-length", "--seqlen", help="Tokens a sample.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the choice of samples.")] = 0,
    eval_text: Annotated[
        list[str] | None, typer.Option(help="A file, python-docs or licences; repeat it for more.")
    ] = None,
    eval_window: Annotated[int | None, typer.Option(help="Tokens a window; 1024, or the model's limit.")] = None,
    eval_windows: Annotated[int, typer.Option(help="The first so many windows of each text; 0: all.")] = 20,
    targets: Annotated[list[str] | None, typer.Option(help="Operators to prune; repeat it for more.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Operators to leave alone; repeat it for more.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32",
    output: Annotated[Path, typer.Option(help="Folder for the result; must be empty or not there.")] = Path("compared"),
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted comparison.")] = False,
    plots: Annotated[bool, typer.Option(help="Draw the results (needs convexprune[plot]).")] = True,
) -> None:
    """Compare methods on the same tokens: errors, perplexity, KL to the dense model, seconds, products, memory."""
    settings = dict(locals())
    from transformers.utils.logging import disable_progress_bar

    from convexprune.pipeline.machine import default_device
    from convexprune.validation import compare as compare_methods
    from convexprune.validation.results import table

    disable_progress_bar()
    lists = {"methods": "methods", "sparsity": "sparsities", "pattern": "patterns", "convention": "conventions"}
    lists |= {"allocation": "allocations"}
    settings |= {plural: settings.pop(name).split(",") for name, plural in lists.items()}
    settings["sparsities"] = [_share(text) for text in settings["sparsities"]]
    settings |= {"targets": targets or ["Linear"], "ignore": ignore or [], "device": default_device(device)}
    settings |= {"eval_windows": eval_windows or None, "command": shlex.join(["convexprune", *sys.argv[1:]])}
    texts = settings.pop("eval_text")
    if texts:
        settings["eval_texts"] = texts
    with _progress() as progress:
        result = compare_methods(**settings, progress=lambda total: _steps(progress, total))
    console.print(table(result))
    console.print(f"compare.json, report.md and plots: {output.resolve()}", soft_wrap=True)


@app.command()
def verify(
    source: Annotated[str | None, typer.Argument(help="Model, or folder of a run. Left out: the bundled OPT.")] = None,
    operators: Annotated[list[str] | None, typer.Option(help="Operators to verify; repeat it for more.")] = None,
    sample: Annotated[int, typer.Option(help="Operators drawn if none is named; 0 is all.")] = 3,
    rows: Annotated[int, typer.Option(help="Rows of the blocks that oracles solve.")] = 4,
    columns: Annotated[int, typer.Option(help="Columns of the blocks that oracles solve.")] = 32,
    bound_rows: Annotated[int, typer.Option(help="Rows of an operator that the lower bound is for.")] = 4,
    tolerance: Annotated[float, typer.Option(help="Largest relative difference of objectives.")] = 1e-6,
    gap: Annotated[float, typer.Option(help="Largest relative duality gap at default settings.")] = 1e-4,
    method: Annotated[str | None, typer.Option(help="Of a fresh model: as for prune.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Of a fresh model: as for prune.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Of a fresh model: as for prune.")] = None,
    quota: Annotated[str | None, typer.Option(help="Of a fresh model: as for prune.")] = None,
    error_correction: Annotated[float | None, typer.Option(help="Of a fresh model: as for prune.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Of a fresh model: as for prune.")] = None,
    num_calibration_samples: Annotated[int | None, typer.Option("--num-calibration-samples", "--nsamples")] = None,
    max_seq_length: Annotated[int | None, typer.Option("--max-seq-length", "--seqlen", help="Tokens a sample.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of a fresh model: as for prune.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
) -> None:
    """Check answers against three foreign solvers, and pruned weights against a bound that no pruning can beat.

    Ends with exit status 1 if a tolerance is missed.
    """
    recipe = {
        "method": method, "sparsity": sparsity, "pattern": pattern, "quota": quota, "dataset": dataset,
        "error_correction": error_correction, "num_calibration_samples": num_calibration_samples,
        "max_seq_length": max_seq_length, "dtype": dtype,
    }  # fmt: skip
    from transformers.utils.logging import disable_progress_bar

    from convexprune import validation
    from convexprune.pipeline.machine import default_device

    disable_progress_bar()
    with console.status("verifying") as status:
        result = validation.verify(
            source,
            operators=operators or (),
            sample=sample or None,
            rows=rows,
            columns=columns,
            bound_rows=bound_rows,
            tolerance=tolerance,
            gap=gap,
            seed=seed,
            device=default_device(device),
            tell=lambda name: status.update(f"verified {name}"),
            **{name: value for name, value in recipe.items() if value is not None},
        )
    if as_json:
        print(result.to_json())
    else:
        for table in result.tables():
            console.print(table)
        for fault in result.faults:
            console.print(f"[bold red]missed[/]: {fault}", highlight=False, soft_wrap=True)
        verdict = "[bold green]passed[/]" if result.passed else "[bold red]failed[/]"
        console.print(f"{verdict}: {len(result.comparisons)} problems; median bound / error {result.median_ratio:.2f}; "
                      f"{result.seconds:.0f} s")  # fmt: skip
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder, config.json or hub name; only the configuration is read.")],
    device_memory: Annotated[str | None, typer.Option(help="What has to be enough, as 24GiB.")] = None,
    method: Annotated[str, typer.Option(help="As for prune, like all that follows.")] = "convex",
    preset: Annotated[str | None, typer.Option()] = None,
    sparsity: Annotated[float | None, typer.Option()] = None,
    pattern: Annotated[str, typer.Option()] = "unstructured",
    quota: Annotated[str, typer.Option()] = "matrix",
    num_calibration_samples: Annotated[int, typer.Option("--num-calibration-samples", "--nsamples")] = 128,
    held_out_samples: Annotated[int | None, typer.Option()] = None,
    max_seq_length: Annotated[int | None, typer.Option("--max-seq-length", "--seqlen")] = None,
    batch_size: Annotated[int, typer.Option()] = 1,
    targets: Annotated[list[str] | None, typer.Option()] = None,
    ignore: Annotated[list[str] | None, typer.Option()] = None,
    error_correction: Annotated[float, typer.Option()] = 1.0,
    prefix: Annotated[str, typer.Option()] = "dense",
    refit: Annotated[bool | None, typer.Option()] = None,
    device: Annotated[str, typer.Option(help="Where products are timed, for the estimate.")] = "auto",
    dtype: Annotated[str | None, typer.Option()] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that the checkpoint brings.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
) -> None:
    """What pruning a model would do and need: operators, memory, an estimate of the time. No weight is read.

    Ends with exit status 1 if the device memory is not enough.
    """
    settings = dict(locals())
    from convexprune.adapters.inspection import inspect as inspect_model
    from convexprune.pipeline.cost import parse_bytes
    from convexprune.pipeline.machine import default_device

    del settings["as_json"]
    settings |= {
        "targets": tuple(targets or ["Linear"]),
        "ignore": tuple(ignore or []),
        "source": settings.pop("model"),
    }
    settings |= {
        "device": default_device(device),
        "device_memory": parse_bytes(device_memory) if device_memory else None,
    }
    found = inspect_model(**settings)
    if as_json:
        print(found.to_json())
    else:
        for table in found.tables():
            console.print(table)
        for line in (*found.notes, *found.verdict()):
            console.print(line, highlight=False, soft_wrap=True)
    if not found.fits:
        raise typer.Exit(1)


@app.command("list")
def names() -> None:
    """The families, solvers, methods, presets and patterns that there are."""
    from convexprune.adapters import TESTED
    from convexprune.pipeline import PRESETS
    from convexprune.pruners import PRUNERS
    from convexprune.solvers import solver_names

    table = Table(box=None, show_header=False, padding=(0, 2))
    families = ", ".join(TESTED.values())
    table.add_row("families", f"tested: {families}; any other decoder of transformers by watching it run, or refused")
    table.add_row("solvers", ", ".join(solver_names()))
    table.add_row("methods", ", ".join(sorted(PRUNERS)))
    table.add_row("presets", ", ".join(PRESETS))
    table.add_row("patterns", "unstructured (quota: matrix, row), N:M for N non-zeros in every M inputs, as 2:4")
    console.print(table)


def main() -> None:
    """Run the command line; an error that is the user's to mend is one message and exit status 2."""
    warnings.simplefilter("default")
    try:
        app(standalone_mode=True)
    except ConvexpruneError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: {error}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _progress() -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PatternError(f"Sparsity {text!r} is no number: it is the share of zeros, 0.5 for half.") from None


def _steps(progress: Progress, total: int) -> Callable[[str], None]:
    task = progress.add_task("comparing", total=total)
    return lambda step: progress.update(task, advance=1, description=step)


def _follow(progress: Progress, total: int) -> Callable[[OperatorReport], None]:
    task = progress.add_task("pruning", total=total)

    def tell(o: OperatorReport) -> None:
        gap = "" if o.gap is None else f"  gap {o.gap:.0e}"
        progress.update(task, advance=1, description=f"{o.name}  error {o.relative_error:.1e}{gap}  {o.seconds:.1f} s")

    return tell
