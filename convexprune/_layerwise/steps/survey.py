"""Survey the cost of pruning parts of a model to several patterns, in a single pass over the dense model."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor

from convexprune._layerwise.allocation import Unit, row_weights
from convexprune._layerwise.capture import Recorded
from convexprune._layerwise.context import LayerContext
from convexprune._layerwise.model import AbstractModel, AbstractOperator
from convexprune._layerwise.pipeline import AbstractStackStep, Pipeline, Stack
from convexprune._layerwise.settings import LayerSettings
from convexprune._layerwise.steps.observe import Observe
from convexprune._layerwise.steps.prune import solved
from convexprune._layerwise.steps.trials import Trials
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerWalk
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
    trials: Sequence[Trials] = (),
) -> list[Unit]:
    """Prune every operator of the dense model to every pattern, write nothing, and return the costs.

    A single decoder layer is in memory. A cost is 1/2 sum_i f_i mean (delta y_i)^2 with the `fisher` f_i [m] of
    outputs, the Gauss-Newton estimate of the loss with a diagonal metric, in nats per token, comparable across
    layers. The error is on held-out windows, or on all without held-out windows. The cost of bits alone is forecast
    from all windows (`convexprune.quantizers._forecast`). The default pruner is SparseGPT: quick, and only the shape
    of a curve matters. The weights serve `trials`, too.
    """
    pruner, units = pruner or SparseGPT(), list[Unit]()
    settings = LayerSettings(pruner, Unstructured(0.0), correction=0)

    def step(context: LayerContext) -> None:
        context.held_out = held_out
        costs = Survey(patterns, fisher, {pattern for trial in trials for pattern in trial.patterns})
        Pipeline(settings, [Observe(), costs])(context)
        units.extend(costs.units())
        for trial in trials:
            trial.visit(context, costs.weights)

    count = len(model.layers)
    on_layer = begin("looking at the dense model", count)
    LayerWalk(model, windows, MemoryStore(range(count), record), on_layer=on_layer).run(step)
    return units


class Survey(AbstractStackStep):
    """Prune stacks to every pattern and keep the costs, and the weights of some patterns."""

    edits: ClassVar[bool] = False

    def __init__(
        self, patterns: Sequence[Constraint], fisher: Mapping[str, Tensor], kept: Collection[Constraint] = ()
    ) -> None:
        self._patterns, self._fisher = patterns, fisher
        self.weights = {pattern: dict[AbstractOperator, Tensor]() for pattern in kept}
        self._costs = dict[str, tuple[int, dict[Constraint, float]]]()
        self._scores = list[Tensor]()
        self._powers = torch.zeros(4, dtype=torch.float64)

    def __call__(self, stacks: Sequence[Stack]) -> None:
        for stack in stacks:
            weight, moments = stack.weight, stack.statistics.total
            heights = tuple(operator.shape[0] for operator in stack.group.operators)
            costs = {name: dict[Constraint, float]() for name in stack.names}
            forecast = cache(partial(Forecast, LayerProblem(weight, moments, Unstructured(0.0), 0.0)))
            for pattern in self._patterns:
                sized = zip(stack.names, heights, strict=True)
                fits = {name for name, height in sized if _fits(pattern, height, weight.shape[1])}
                if not fits:
                    continue
                alike = Stacked.alike(pattern, heights)
                bits_alone = pattern.grid is not None and pattern.sparsity == 0
                errors = (
                    forecast().errors(alike) if bits_alone else self._errors(stack, alike, self.weights.get(pattern))
                ).double()
                for name, error in zip(stack.names, errors.split(heights), strict=True):
                    if name in fits:
                        costs[name][pattern] = float(error @ self._fisher[name].to(error)) / 2
            sizes = [height * weight.shape[1] for height in heights]
            self._costs |= {name: (size, costs[name]) for name, size in zip(stack.names, sizes, strict=True)}
            self._powers += sums_of_powers(weight)
            self._scores.append((weight.abs() * moments.gram.diagonal().sqrt()).flatten().cpu())

    def _errors(self, stack: Stack, pattern: Stacked, kept: dict[AbstractOperator, Tensor] | None = None) -> Tensor:
        """Return the error by row of a stack pruned to a pattern, on the tokens that judge; keep its weights."""
        folds = stack.statistics
        factors = torch.cat([row_weights(self._fisher[name]) for name in stack.names]).sqrt()
        problem = LayerProblem(stack.weight, folds.total, pattern, 0.0)
        edit = QUANTIZER.quantize(problem, *solved([problem], [factors], stack.pruner))
        if kept is not None:
            parts = edit.weight.split(pattern.heights)
            kept |= {o: w.to(o.read().dtype) for o, w in zip(stack.group.operators, parts, strict=True)}
        judge = folds.held_out if folds.held_out.tokens else folds.total
        return LayerProblem(stack.weight, judge, pattern, 0.0).squared_error(edit.weight)

    def units(self) -> list[Unit]:
        """Return a unit by operator of the layer, with outliers and skewness of the layer."""
        if not self._costs:
            return []
        outliers, skewed = share_of_outliers(torch.cat(self._scores)), skewness(self._powers)
        return [Unit(name, size, costs, outliers, skewed) for name, (size, costs) in self._costs.items()]


def _fits(pattern: Constraint, rows: int, columns: int) -> bool:
    """Return True if an operator can have a pattern: few rows have no room for scales."""
    try:
        pattern.check(rows, columns)
    except PatternError:
        return False
    return True
