"""The step that moves the kept values of a layer to lower the error of its outputs."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from convexprune._layerwise.capture import CachedSubmodule, Recorded, replaying, stage_inputs
from convexprune._layerwise.context import LayerContext, recorded
from convexprune._layerwise.layer_error import Kept, LayerError, OnGrid
from convexprune._layerwise.model import AbstractOperator, Call, Group
from convexprune._layerwise.pipeline import AbstractLayerStep
from convexprune._layerwise.refining import WAYS
from convexprune._layerwise.settings import LayerSettings, Refinement
from convexprune.constraints import Grid


@dataclass(frozen=True, eq=False)
class Refine(AbstractLayerStep):
    """Move the kept values, or the scales, of all operators of a layer together, or first those of its attention.

    Masks and codes stay. Held-out windows choose among the candidates and the weights from before; without such
    windows, the calibration windows do.
    """

    settings: LayerSettings
    refinement: Refinement

    def __call__(self, context: LayerContext) -> None:
        for error in _errors(context, self.settings, self.refinement.halves):
            if error.operators:
                self._refine(context, error)

    def _refine(self, context: LayerContext, error: LayerError) -> None:
        """Fit, take the best on the windows that judge, and note facts for the reports."""
        began, count = time.perf_counter(), len(error.inputs)
        numbers = range(count)
        fitted, judged = numbers[: count - context.held_out], numbers[count - context.held_out :]
        judged = judged if error.tokens(judged) else fitted
        best, found = error.zero(), dict[str, float]()
        facts = {"refine_error_before": error.relative(best, fitted)}
        facts["refine_held_out_before"] = least = error.relative(best, judged)
        for x, said in WAYS[self.refinement.way]().candidates(error, fitted):
            if (held := error.relative(x, judged)) < least:
                best, least, found = x, held, said
        facts |= {"refine_error": error.relative(best, fitted), "refine_held_out": least, **found}
        for name, weight in error.stored(best).items():
            error.operators[name].write(context.ranks.broadcast(weight))
        facts["refine_seconds"] = time.perf_counter() - began
        for names, edit in context.edits.items():
            if any(name.removeprefix(f"{context.layer.name}.") in error.operators for name in names):
                context.edits[names] = replace(edit, facts=edit.facts | facts)


def _errors(context: LayerContext, settings: LayerSettings, halves: bool) -> Iterator[LayerError]:
    """Yield the error of all values; or by half, if a submodule can be replayed, attention as a rule: of the
    submodule's outputs, and then of the layer's by the rest.
    """
    inputs, dense, outputs = context.inputs[settings.prefix], context.inputs["dense"], context.observed.outputs
    operators, device = dict(_movable(context, settings)), context.model.device
    last = context.layer.operators[-1].name if operators else ""
    weights = settings.token_weights.get(f"{context.layer.name}.{last}")
    batches = () if weights is None or not inputs else weights.split(len(inputs[0]))
    whole = LayerError(
        context.layer.module, context.calls, {}, {}, inputs,
        lambda i: outputs[i].to(device).float(),
        lambda i: outputs[i].to(device).float() - dense[i].to(device).float(),
        lambda i: batches[i] if i < len(batches) else None,
        ranks=context.ranks,
    )  # fmt: skip
    if halves and context.observed.cached:
        group, submodule = next(iter(context.observed.cached.items()))
        own = {parameter.data_ptr() for parameter in submodule.module.parameters()}
        inside = {operator: each for operator, each in operators.items() if operator.read().data_ptr() in own}
        operators = {operator: each for operator, each in operators.items() if operator not in inside}
        y = _dense_outputs(context, group, submodule)
        part = replace(whole, target=y, energy=y, weights=lambda _: None, end=submodule.module)
        yield part.of(inside)
        seen = _inputs(context, inputs, group)
        whole = replace(whole, known=lambda i: replaying({submodule: seen[i].to(device).float()}))
    yield whole.of(operators)


def _movable(context: LayerContext, settings: LayerSettings) -> Iterator[tuple[AbstractOperator, Kept]]:
    for operator in context.layer.operators:
        pattern, before = settings.pattern_of(f"{context.layer.name}.{operator.name}"), operator.read().clone()
        if isinstance(pattern.grid, Grid):
            yield operator, OnGrid(before, pattern.grid)
        elif pattern.grid is None and pattern.zeros(*operator.shape):
            yield operator, Kept(before)


def _dense_outputs(context: LayerContext, group: Group, submodule: CachedSubmodule) -> Callable[[int], Tensor]:
    """Return the dense outputs of a submodule by batch: those of the linear map that closes it."""
    with context.with_dense([group]):
        outputs = recorded((Call()(submodule.linear, x) for x in context.observed.inputs[group]), context.record())
    return lambda i: outputs[i].to(context.model.device).float()


def _inputs(context: LayerContext, batches: Sequence[Tensor], group: Group) -> Recorded:
    """Record the inputs of a group in the layer as it is now."""
    seen = (stage_inputs(context.layer, [group], context.calls(batch), batch)[group] for batch in batches)
    return recorded(seen, context.record())
