"""The patterns of a comparison's variants whose zeros are not spread evenly."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from convexprune.adapters import HuggingFaceModel
from convexprune.adapters.gradients import output_fisher
from convexprune.model import Call
from convexprune.pattern import parse_pattern
from convexprune.pipeline import LayerSettings
from convexprune.pipeline.survey import Pattern, Unit, allocated, candidates, survey

from .variants import Variant

FISHER_WINDOWS = 16  # a gradient costs three forward passes of the whole model


@torch.no_grad()
def with_allocations(
    model: HuggingFaceModel,
    calibration: Tensor,
    held_out: Tensor,
    variants: Sequence[Variant],
    settings: Mapping[str, LayerSettings],
    batch_size: int,
) -> dict[str, LayerSettings]:
    """The settings by variant, with a pattern for each operator where the allocation is not uniform.

    The dense model is surveyed once for all variants, with SparseGPT's weights, so that a method's allocation does not
    depend on the method.

    Raises:
        PatternError: a share of zeros cannot be allocated.
        ModelError: the gradients of an operator's outputs cannot be seen.
    """
    uneven = {
        v.name: parse_pattern(v.pattern, v.sparsity, v.recipe().quota) for v in variants if v.allocation != "uniform"
    }
    if not uneven:
        return dict(settings)
    units = _survey(model, calibration, held_out, list(uneven.values()), batch_size)
    return {
        v.name: replace(settings[v.name], patterns=allocated(units, v.allocation, uneven[v.name]))
        if v.name in uneven
        else settings[v.name]
        for v in variants
    }


def _survey(
    model: HuggingFaceModel, calibration: Tensor, held_out: Tensor, asked: Sequence[Pattern], batch_size: int
) -> list[Unit]:
    judges = list(held_out.split(batch_size)) if len(held_out) else []
    batches = [*calibration.split(batch_size), *judges]
    recorded: dict[torch.Size, list[Call]] = {}
    for ids in batches:
        if ids.shape not in recorded:
            recorded[ids.shape] = model.calls(ids)
    patterns = list({candidate: None for pattern in asked for candidate in candidates(pattern)})
    return survey(
        model,
        [model.first_inputs(ids) for ids in batches],
        len(judges),
        lambda number: lambda batch: recorded[batch.shape[:2]][number],
        patterns,
        output_fisher(model, calibration[:FISHER_WINDOWS], batch_size),
    )
