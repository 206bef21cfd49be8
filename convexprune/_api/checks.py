"""Decisions of a call of `prune` before any work: the executor, warnings, and the place of copies of the report."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from convexprune._api.windows import Windows
from convexprune._device.kernels import eager_because
from convexprune._device.machine import default_workers
from convexprune._layerwise.processes import require_rendezvous
from convexprune._recipe_file import RECIPE, read_recipe, write_recipe
from convexprune._runs.executors import AbstractExecutor, make_executor
from convexprune._runs.folder import REPORT, RunFolder
from convexprune._schema.functions import Call
from convexprune._storage.files import write_text
from convexprune._storage.staging import output_folder
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters._data.rows import shortage
from convexprune.adapters._discovery.selection import shared_weights, unknown_maps
from convexprune.errors import ConvexpruneError, OutputError, RecipeError
from convexprune.recipe import Recipe, make_recipe
from convexprune.report import Report


def executor_for(call: Call, recipe: Recipe, source: Any, device: str) -> AbstractExecutor:
    name, workers = call.executor, call.workers
    if workers is not None and name in ("serial", "ranks"):
        why = "prunes in this process" if name == "serial" else "has as many as the launcher started"
        raise RecipeError(f"workers={workers}: executor={name!r} {why}. Leave it out, or take 'pool' or 'ray'.")
    if call.overwrite and name == "ranks":
        raise RecipeError("overwrite=True with executor='ranks': one process replaces a folder. Remove it yourself.")
    if name != "serial" and call.output_dir is None:
        raise RecipeError(f"executor={name!r}: the workers meet in the output folder. Give output_dir.")
    if name in ("pool", "ray") and recipe.prefix == "pruned":
        instead = "" if recipe.build_pattern().compensates else "; or use prefix='dense'"
        raise RecipeError(
            f"executor={name!r} with prefix='pruned': each layer waits for the one before it to be pruned, so layers "
            "cannot be spread. executor='ranks', started by torchrun, spreads the samples of each layer, and "
            f"executor='serial' over threads{instead}."
        )
    if name in ("pool", "ray") and isinstance(source, PreTrainedModel):
        raise RecipeError(f"executor={name!r}: the workers cannot open a model that is loaded. Give its folder.")
    return make_executor(name, workers or default_workers(device, recipe.threads), device)


def team_size(recipe: Recipe, executor: AbstractExecutor) -> int:
    """Return the number of ranks that prune a layer together; 1 if a layer has a single process."""
    if recipe.prefix == "dense" or executor.together == 1:
        return 1
    require_rendezvous()
    batches = -(-recipe.num_calibration_samples // recipe.batch_size)
    if batches < executor.together:
        raise RecipeError(
            f"{executor.together} ranks share {batches} batches of calibration samples, and one would have none. Give "
            "more samples, smaller batches (batch_size), or fewer ranks."
        )
    return executor.together


TOO_FEW = 8192  # tokens for columns to be chosen by: with a quarter of them SmolLM2 is 8 % worse (lab/tried.md)
ORACLES, FEW = ("cvxpy", "scipy"), 32  # solvers that are exact and slow, and the inputs up to which they are quick


def run_warnings(model: HuggingFaceModel, windows: Windows, recipe: Recipe) -> Iterator[str]:
    shapes = [operator.shape for layer in model.layers for operator in layer.operators]
    widest, fewest = max(inputs for _, inputs in shapes), min(outputs for outputs, _ in shapes)
    few, shared = shortage(windows["calibration"], widest), shared_weights(model.left_alone, model.layers)
    removes = recipe.build_pattern().removes is not None  # then what is left is of no matter
    unknown = None if removes else unknown_maps(model.left_alone, model.model, model.layers)
    yield from (warning for warning in (few, shared, unknown, eager_because(model.device)) if warning is not None)
    if recipe.method == "convex" and recipe.solver in ORACLES and widest > FEW:
        yield (
            f"solver={recipe.solver!r} solves row by row, 60 problems a row: minutes for an operator of {FEW} inputs, "
            f"and this model has up to {widest}. It is slow, and there to check others (convexprune verify)."
        )
    tokens = windows["calibration"].numel()
    if recipe.allocation == "columns" and tokens < TOO_FEW:
        yield (
            f"Columns are chosen by the loss on {tokens:,} tokens. On fewer than {TOO_FEW:,} the choice is worse "
            "(docs/channels.md). Give more samples, or compare allocation='uniform', which needs no gradients."
        )
    if recipe.bound_rows > fewest:
        yield f"bound_rows={recipe.bound_rows}: all rows are bounded of operators with fewer outputs ({fewest})."


def check_copies(call: Call) -> None:
    """Refuse, before any work, a folder in which copies would replace what is not such a copy."""
    folder = _copies(call)
    there = [] if folder is None else [name for name in (REPORT, RECIPE) if os.path.lexists(folder / name)]
    if there and not (call.resume or call.overwrite):
        raise OutputError(f"{folder} already holds {' and '.join(there)}. Give another report_dir (--save).")


def write_copies(report: Report, call: Call) -> None:
    if (folder := _copies(call)) is not None:
        write_text(folder / REPORT, report.to_json())
        write_recipe(make_recipe(**report.recipe), folder)


def _copies(call: Call) -> Path | None:
    """Return the folder for copies of report and recipe, unless it is that of the result, where both lie anyway.

    Refuse a folder with files of these names that are no report and no recipe of a run.
    """
    if call.report_dir is None:
        return None
    if call.output_dir is not None and len({f.expanduser().resolve() for f in (call.report_dir, call.output_dir)}) == 1:
        return None
    folder = output_folder(call.report_dir, is_staged=False)
    for name, read in {
        REPORT: lambda: RunFolder(folder).report(),
        RECIPE: lambda: read_recipe(folder / RECIPE),
    }.items():
        if os.path.lexists(path := folder / name):
            try:
                if path.is_symlink():
                    raise OutputError("a link")
                read()
            except ConvexpruneError as cause:
                raise OutputError(
                    f"{path} was not written by a run, and is not replaced. Give another report_dir (--save)."
                ) from cause
    return folder
