"""Who prunes: the executor that a call of `prune` asks for, or why its layers cannot be spread like that."""

from typing import Any

from transformers import PreTrainedModel

from convexprune.errors import RecipeError, require_at_least
from convexprune.pipeline import AbstractExecutor, make_executor
from convexprune.pipeline.machine import default_workers
from convexprune.pipeline.team import require_rendezvous
from convexprune.recipe import Recipe


def executor_for(settings: dict[str, Any], device: str, threads: int | None) -> AbstractExecutor:
    """The executor that the settings of a call name.

    Args:
        settings: of the call, by name.
        device: where to compute.
        threads: of each process; None is torch's choice.

    Returns:
        The executor.

    Raises:
        RecipeError: no executor has this name, or it fits neither the run nor this machine.
        DependencyError: Ray is missing.
    """
    name, workers = settings["executor"], settings["workers"]
    require_at_least(1, workers=workers)
    if workers is not None and name in ("serial", "ranks"):
        why = "prunes in this process" if name == "serial" else "has as many as the launcher started"
        raise RecipeError(f"workers={workers}: executor={name!r} {why}. Leave it out, or take 'pool' or 'ray'.")
    if name != "serial":
        _check_spread(settings)
    return make_executor(name, workers or default_workers(device, threads), device)


def team_size(recipe: Recipe, executor: AbstractExecutor) -> int:
    """The number of ranks that prune each layer together.

    Args:
        recipe: of the run.
        executor: of the run.

    Returns:
        The number; 1 if each layer has one process.

    Raises:
        RecipeError: there are more ranks than batches, or the launcher does not say where they meet.
    """
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


def _check_spread(settings: dict[str, Any]) -> None:
    """Refuse what cannot be spread over processes.

    Raises:
        RecipeError: the run has no folder to meet in, or its layers wait for each other, or its model is in the memory
            of this process.
    """
    name = settings["executor"]
    if settings["output_dir"] is None:
        raise RecipeError(f"executor={name!r}: the workers meet in the output folder. Give output_dir.")
    if settings["prefix"] == "pruned" and name != "ranks":
        raise RecipeError(
            f"executor={name!r} with prefix='pruned': each layer waits for the one before it to be pruned, so layers "
            "cannot be spread. executor='ranks', started by torchrun, spreads the samples of each layer, and "
            "executor='serial' over threads; or use prefix='dense'."
        )
    if name != "ranks" and isinstance(settings["model"], PreTrainedModel):
        raise RecipeError(f"executor={name!r}: the workers cannot open a model that is loaded. Give its folder.")
