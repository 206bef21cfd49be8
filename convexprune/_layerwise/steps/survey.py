"""What pruning each part of a model to each pattern would cost: one pass over the dense model, which stays as it is."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial

import torch
from torch import Tensor

from convexprune._layerwise.allocation import Unit, row_weights
from convexprune._layerwise.capture import Calls, Observed, Recorded
from convexprune._layerwise.model import AbstractModel, DecoderLayer
from convexprune._layerwise.settings import HiddenStates, LayerSettings
from convexprune._layerwise.steps.group import solved
from convexprune._layerwise.steps.stages import stage_folds
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.targets import stack_of
from convexprune._layerwise.walk import LayerContext, LayerWalk
from convexprune._progress import begin
from convexprune.constraints import Constraint, Stacked, Unstructured
from convexprune.core._allocation import share_of_outliers, skewness, sums_of_powers
from convexprune.errors import PatternError
from convexprune.pruners import AbstractPruner, LayerProblem, SparseGPT
from convexprune.quantizers import Descent
from convexprune.quantizers._forecast import Forecast

QUANTIZER = Descent(sweeps=0, rounds=0)  # quick


@torch.no_grad()
def survey(
    model: AbstractModel,
    windows: Sequence[Tensor],
    held_out: int,
    patterns: Sequence[Constraint],
    fisher: Mapping[str, Tensor],
    pruner: AbstractPruner | None = None,
    record: Callable[[], Recorded] = list,
) -> list[Unit]:
    """Prune every operator of the dense model to every pattern, write nothing, and report the costs.

    One decoder layer at a time is in memory. A cost is 1/2 sum_i f_i mean (delta y_i)^2, the Gauss-Newton estimate of
    the loss with a diagonal metric, in nats a token, and comparable across layers. It is taken on the windows held out,
    or on all if none is. What bits alone cost is forecast from all (`convexprune.quantizers._forecast`).

    Args:
        windows: token ids [batch length].
        fisher: f_i = mean (d loss / d y_i)^2 of each operator's outputs [m].
        pruner: that gives the weights; None is SparseGPT, because the shape of a curve is what matters, and it is
            quick. Rows compete as `row_weights` of f say.
    """
    pruner, units = pruner or SparseGPT(), list[Unit]()

    def step(context: LayerContext) -> None:
        observed, hidden = context.observe(), HiddenStates(context.inputs["dense"], context.inputs["dense"], held_out)
        units.extend(_units(context.layer, context.calls, hidden, observed, patterns, fisher, pruner))
        context.hand_on(observed.outputs)

    count = len(model.layers)
    on_layer = begin("looking at the dense model", count)
    LayerWalk(model, windows, MemoryStore(range(count), record), on_layer=on_layer).run(step)
    return units


def _units(
    layer: DecoderLayer,
    calls: Calls,
    hidden: HiddenStates,
    observed: Observed,
    patterns: Sequence[Constraint],
    fisher: Mapping[str, Tensor],
    pruner: AbstractPruner,
) -> list[Unit]:
    settings = LayerSettings(pruner, Unstructured(0.0), correction=0)
    found = dict[str, tuple[int, dict[Constraint, float]]]()
    scores: list[Tensor] = []
    powers = torch.zeros(4, dtype=torch.float64)
    for number in range(len(layer.stages)):
        for part in stage_folds(layer, number, calls, hidden, observed, settings, dict(observed.inputs)):
            for group, folds in part.items():
                heights = tuple(operator.shape[0] for operator in group.operators)
                weight = stack_of(group)
                judge = folds.held_out if folds.held_out.tokens else folds.total
                names = [f"{layer.name}.{operator.name}" for operator in group.operators]
                costs = {name: dict[Constraint, float]() for name in names}
                forecast = cache(partial(Forecast, LayerProblem(weight, folds.total, Unstructured(0.0), 0.0)))
                for pattern in patterns:
                    stack = Stacked.alike(pattern, heights)
                    if pattern.share > pattern.sparsity == 0:  # bits alone are saved
                        errors = forecast().errors(stack).double()
                    else:
                        factors = torch.cat([row_weights(fisher[name]) for name in names]).sqrt()
                        problem = LayerProblem(weight, folds.total, stack, 0.0)
                        made = QUANTIZER.quantize(problem, *solved([problem], [factors], pruner))
                        errors = LayerProblem(weight, judge, stack, 0.0).squared_error(made.weight).double()
                    for name, error in zip(names, errors.split(heights), strict=True):
                        with suppress(PatternError):  # few rows have no room for the scales of few bits
                            pattern.check(len(error), weight.shape[1])
                            costs[name][pattern] = float(error @ fisher[name].to(error)) / 2
                sizes = [height * weight.shape[1] for height in heights]
                found |= {name: (size, costs[name]) for name, size in zip(names, sizes, strict=True)}
                powers += sums_of_powers(weight)
                scores.append((weight.abs() * folds.total.gram.diagonal().sqrt()).flatten().cpu())
    outliers = share_of_outliers(torch.cat(scores)) if scores else 0.0
    return [Unit(name, size, costs, outliers, skewness(powers)) for name, (size, costs) in found.items()]
