"""`convexprune inspect` and `convexprune list`."""

from typing import Annotated

import typer
from rich.table import Table

from convexprune.cli import options
from convexprune.cli.application import app, console
from convexprune.cli.progress import following
from convexprune.cli.stopping import stoppable


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder, config.json or hub name; only the configuration is read.")],
    device_memory: Annotated[str | None, typer.Option(help="What has to be enough, as 24GiB.")] = None,
    method: Annotated[str, typer.Option(help="As for prune, like all that follows.")] = "convex",
    preset: Annotated[str | None, typer.Option(help="fistapruner.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of zeros, 0.5 unless the pattern says.")] = None,
    pattern: Annotated[str, typer.Option(help="unstructured, or N:M, as 2:4.")] = "unstructured",
    quota: options.Quota = "matrix",
    allocation: options.Allocation = None,
    num_calibration_samples: options.Samples = 128,
    held_out_samples: options.HeldOut = None,
    max_seq_length: options.Length = None,
    batch_size: options.BatchSize = 1,
    targets: options.Targets = None,
    ignore: options.Ignore = None,
    error_correction: Annotated[float | None, typer.Option(help="0 to 1. Left out: by --prefix.")] = None,
    prefix: Annotated[str, typer.Option(help="dense or pruned.")] = "dense",
    refit: Annotated[bool | None, typer.Option(help="Least squares on the support.")] = None,
    device: Annotated[str, typer.Option(help="Where products are timed, for the estimate.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16.")] = None,
    trust_remote_code: options.RemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """What pruning a model would do and need: operators, memory, an estimate of the time. No weight is read.

    Ends with exit status 1 if the device memory is not enough.
    """
    settings = dict(locals())
    del settings["as_json"]
    settings |= {
        "targets": tuple(targets or ["Linear"]),
        "ignore": tuple(ignore or []),
        "source": settings.pop("model"),
    }
    settings["device_memory"] = options.parse_bytes(device_memory) if device_memory else None
    with stoppable(), following():
        from convexprune.adapters.inspection import inspect as inspect_model

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
    from convexprune.pruners import PRUNERS
    from convexprune.recipe import PRESETS, SOLVERS
    from convexprune.solvers import make_solver, solver_names

    table = Table(box=None, show_header=False, padding=(0, 2))
    families = ", ".join(TESTED.values())
    table.add_row("families", f"tested: {families}; any other decoder of transformers by watching it run, or refused")
    for number, name in enumerate(solver_names()):
        takes = ", ".join(_PENALTIES.get(each, each) for each in (p.__name__ for p in make_solver(name).penalties))
        use = "prune --solver" if name in SOLVERS else "refits, not prune --solver"
        table.add_row("" if number else "solvers", f"{name}, for {use}; takes {takes}")
    table.add_row("methods", ", ".join(sorted(PRUNERS)))
    table.add_row("presets", ", ".join(PRESETS))
    table.add_row(
        "patterns", "unstructured (quota: matrix, row), N:M (N non-zeros in every M inputs, as 2:4), columns, int8"
    )
    console.print(table)


_PENALTIES = {"AbstractPenalty": "any penalty", "Support": "a fixed support"}
