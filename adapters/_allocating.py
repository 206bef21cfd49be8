"""How the zeros of a model are spread over its operators and their rows, by a look at the dense model."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from convexprune._layerwise.capture import Recorded
from convexprune._layerwise.folder_store import FolderStore
from convexprune._layerwise.steps.survey import SURVEYED, WEIGHED, ModelAllocation, allocate_by_rule, candidates, survey
from convexprune.constraints import Constraint
from convexprune.recipe import Recipe

from ._gradients import output_fisher
from ._huggingface import HuggingFaceModel

WINDOWS = 16  # of the calibration text are enough for the shape of a curve (docs/tried.md)
GRADIENTS = 4  # of those are enough for its weight, and for those of rows; they cost four passes of the model


@torch.no_grad()
def allocate_each(
    model: HuggingFaceModel,
    calibration: Tensor,
    held_out: Tensor,
    asked: Sequence[tuple[str, Constraint]],
    batch_size: int = 1,
    record: Callable[[], Recorded] = list,
) -> list[ModelAllocation]:
    """For each rule and pattern asked for, what each operator is allocated, from windows [windows length].

    The dense model is surveyed once for all of them, on the first 16 windows of `calibration` and all of `held_out`,
    with SparseGPT's weights, so that an allocation does not depend on the method that uses it. Only the rules with
    curves prune for that; they and "rows" need gradients, on the first 4 windows. Both go layer by layer.

    Args:
        model: the dense model.
        calibration: windows [samples length].
        held_out: windows [samples length].
        asked: the rules and patterns.
        batch_size: windows in a forward pass.
        record: makes a place to keep tensors in.

    Returns:
        One allocation for each that is asked.

    Raises:
        RecipeError, PatternError: see `convexprune._layerwise.steps.survey.allocate_by_rule`.
        ModelError: see `output_fisher`.
    """
    if all(rule == "uniform" for rule, _ in asked):
        return [ModelAllocation({}) for _ in asked]
    calibration = calibration[:WINDOWS]
    validation_batches = list(held_out.split(batch_size)) if len(held_out) else []
    batches = [*calibration.split(batch_size), *validation_batches]
    curves = [pattern for rule, pattern in asked if rule in SURVEYED]
    weighed = any(rule in WEIGHED for rule, _ in asked)
    fisher = output_fisher(model, calibration[:GRADIENTS], batch_size, record) if weighed else {}
    if all(rule in ("uniform", "rows") for rule, _ in asked):
        return [allocate_by_rule((), rule, pattern, fisher) for rule, pattern in asked]
    patterns = list({candidate: None for pattern in curves for candidate in candidates(pattern)})
    units = survey(model, batches, len(validation_batches), patterns, fisher, record=record)
    return [allocate_by_rule(units, rule, pattern, fisher) for rule, pattern in asked]


def allocate(
    model: HuggingFaceModel, calibration: Tensor, held_out: Tensor, recipe: Recipe, store: FolderStore | None
) -> ModelAllocation:
    """That of a run, found once for all processes that share the store and for whoever goes on with it.

    Args:
        model: the dense model.
        calibration: windows [samples length].
        held_out: windows [samples length].
        recipe: of the run.
        store: that of its folder, if it has one.

    Returns:
        The allocation.
    """

    def find(record: Callable[[], Recorded]) -> ModelAllocation:
        asked = [(recipe.allocation, recipe.build_pattern())]
        return allocate_each(model, calibration, held_out, asked, recipe.batch_size, record)[0]

    def keep(store: FolderStore) -> dict[str, Any]:
        with store.scratch(0) as record:
            return asdict(find(record))

    return find(list) if store is None else ModelAllocation(**store.compute_once("allocation", lambda: keep(store)))
