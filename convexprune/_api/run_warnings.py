"""Warnings before a run: valid settings and data that may not be intended."""

from collections.abc import Iterator

from convexprune._api.windows import Windows
from convexprune._device.kernels import eager_because
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters._data.rows import shortage
from convexprune.adapters._discovery.selection import shared_weights, unknown_maps
from convexprune.recipe import Recipe

TOO_FEW = 8192  # tokens for columns to be chosen by: with a quarter of them SmolLM2 is 8 % worse (lab/tried.md)
ORACLES, FEW = ("cvxpy", "scipy"), 32  # solvers that are exact and slow, and the inputs up to which they are quick


def run_warnings(model: HuggingFaceModel, windows: Windows, recipe: Recipe) -> Iterator[str]:
    """Yield warnings before a run: few tokens, untouched weights, no compiler, slow settings."""
    shapes = [operator.shape for layer in model.layers for operator in layer.operators]
    widest, fewest = max(inputs for _, inputs in shapes), min(outputs for outputs, _ in shapes)
    few, shared = shortage(windows["calibration"], widest), shared_weights(model.left_alone, model.layers)
    removes = recipe.build_pattern().removes is not None  # then what is left is of no matter
    unknown = None if removes else unknown_maps(model.left_alone, model.model, model.layers)
    for warning in (few, shared, unknown, eager_because(model.device)):
        if warning is not None:
            yield warning
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
