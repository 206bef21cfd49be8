"""`convexprune verify`."""

from typing import Annotated

import typer
from rich.text import Text

from convexprune.cli import options
from convexprune.cli.application import app, console, show
from convexprune.cli.progress import following
from convexprune.cli.stopping import stoppable


@app.command()
def verify(
    source: Annotated[str | None, typer.Argument(help="Model, or folder of a run. Left out: the bundled OPT.")] = None,
    operators: Annotated[
        list[str] | None, typer.Option(help="Operators to verify, names or re:...; repeat it for more.")
    ] = None,
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
    prefix: Annotated[str | None, typer.Option(help="Of a fresh model: as for prune.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Of a fresh model: as for prune. Of a run: where its data set is now.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Of a run: where its dense model is now.")] = None,
    num_calibration_samples: options.SamplesOrNone = None,
    max_seq_length: options.Length = None,
    dtype: Annotated[str | None, typer.Option(help="Of a fresh model: as for prune.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Check answers against three foreign solvers, and pruned weights against a bound that no pruning can beat.

    Ends with exit status 1 if a tolerance is missed.
    """
    recipe = {
        "method": method, "sparsity": sparsity, "pattern": pattern, "quota": quota, "dataset": dataset,
        "error_correction": error_correction, "prefix": prefix, "max_seq_length": max_seq_length, "dtype": dtype,
        "num_calibration_samples": num_calibration_samples, "model": model,
    }  # fmt: skip
    with stoppable(), following() as shown:
        from transformers.utils.logging import disable_progress_bar

        from convexprune import validation

        disable_progress_bar()

        def verified(name: str) -> None:
            shown(f"verified {name}")

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
            device=device,
            tell=verified,
            **{name: value for name, value in recipe.items() if value is not None},
        )
    if as_json:
        print(result.to_json())
    else:
        for table in result.tables():
            show(table)
        if result.note:
            console.print(result.note, soft_wrap=True)
        for fault in result.faults:
            console.print(Text.assemble(("missed", "bold red"), f": {fault}"), soft_wrap=True)
        verdict = ("passed", "bold green") if result.passed else ("failed", "bold red")
        figures = f"{len(result.comparisons)} problems; median bound / error {result.median_ratio:.2f}, "
        figures += f"undamped {result.median_plain_ratio:.2f}; {result.seconds:.0f} s"
        console.print(Text.assemble(verdict, f": {figures}"), soft_wrap=True)
    if not result.passed:
        raise typer.Exit(1)
