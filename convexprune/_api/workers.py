"""The executor of a call of `prune`, or the reason why layers cannot be spread."""

from typing import Any

from transformers import PreTrainedModel

from convexprune._device.machine import default_workers
from convexprune._layerwise.processes import require_rendezvous
from convexprune._runs.executors import AbstractExecutor, make_executor
from convexprune._schema.functions import Call
from convexprune.errors import RecipeError
from convexprune.recipe import Recipe


def executor_for(call: Call, recipe: Recipe, source: Any, device: str) -> AbstractExecutor:
    name, workers = call.executor, call.workers
    if workers is not None and name in ("serial", "ranks"):
        why = "prunes in this process" if name == "serial" else "has as many as the launcher started"
        raise RecipeError(f"workers={workers}: executor={name!r} {why}. Leave it out, or take 'pool' or 'ray'.")
    if call.overwrite and name == "ranks":
        raise RecipeError("overwrite=True with executor='ranks': one process replaces a folder. Remove it yourself.")
    if name != "serial":
        _check_spread(call, recipe, source)
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


def _check_spread(call: Call, recipe: Recipe, source: Any) -> None:
    name = call.executor
    if call.output_dir is None:
        raise RecipeError(f"executor={name!r}: the workers meet in the output folder. Give output_dir.")
    if recipe.prefix == "pruned" and name != "ranks":
        instead = "" if recipe.build_pattern().compensates else "; or use prefix='dense'"
        raise RecipeError(
            f"executor={name!r} with prefix='pruned': each layer waits for the one before it to be pruned, so layers "
            "cannot be spread. executor='ranks', started by torchrun, spreads the samples of each layer, and "
            f"executor='serial' over threads{instead}."
        )
    if name != "ranks" and isinstance(source, PreTrainedModel):
        raise RecipeError(f"executor={name!r}: the workers cannot open a model that is loaded. Give its folder.")
