"""A decoder layer of a model in memory, as a walk hands it to steps."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.model import AbstractModel
from convexprune._layerwise.pipeline import Pipeline
from convexprune._layerwise.settings import LayerSettings
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerCalls
from convexprune._layerwise.work import stack_steps
from convexprune.report import OperatorReport


def context_of(model: AbstractModel, windows: Tensor, number: int = 0, batch: int = 1, **given: Any) -> LayerContext:
    """Layer `number` of a model of which nothing is pruned, with what the windows make in front of it."""
    batches: Sequence[Tensor] = windows.split(batch)
    calls, hidden = LayerCalls(model, batches), [model.first_inputs(ids) for ids in batches]
    for before in range(number):
        hidden = [calls.of(before)(x)(model.layers[before].module, x) for x in hidden]
    place: dict[str, Any] = {"inputs": {"dense": hidden, "pruned": hidden}, "states": MemoryStore([number])} | given
    return LayerContext(model=model, number=number, layer=model.layers[number], calls=calls.of(number), **place)


def pruned(context: LayerContext, settings: LayerSettings) -> list[OperatorReport]:
    """The reports of a layer that is pruned, observed before unless it was."""
    reports = list[OperatorReport]()
    if not context.observed.outputs:
        context.observe((settings.error_target,))
    Pipeline(settings, stack_steps(settings, reports.append))(context)
    return reports
