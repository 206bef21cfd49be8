"""Survey the cost of pruning parts of a model to several patterns, in a single pass over the dense model."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from convexprune._layerwise.allocation import Unit, candidates, row_weights
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
from convexprune.pruners import AbstractPruner, Cost, LayerProblem, SparseGPT
from convexprune.quantizers import Descent
from convexprune.quantizers._forecast import Forecast

QUANTIZER = Descent(sweeps=0, rounds=0, beam=1)  # quick
DENSE = Unstructured(0.0)
ROWS = 128  # of an operator are enough, since only the shape of a curve matters (lab/tried.md)


def shares_rows(pattern: Constraint) -> bool:
    """Return True if rows share columns or scales, so that a few rows are no sample."""
    return pattern.by_column or not (pattern.grid is None or pattern.grid.by_row)


def needs(pattern: Constraint) -> Cost:
    """Return the needs of a stack in a survey around a pattern: one factor for all bits, or one for each candidate."""
    if pattern.grid is not None and pattern.sparsity == 0:
        return Cost(factorisations=6)
    count, quick = len(candidates(pattern)), SparseGPT.cost
    if shares_rows(pattern):
        needed = quick if pattern.grid is None else quick.then(QUANTIZER.cost(pattern.grid, False))
        return needed._replace(products=count * needed.products, factorisations=count * needed.factorisations)
    return quick._replace(products=0.0, factorisations=count * quick.factorisations)


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
    layers. Massive tokens count less where a layer closes, as in a run. The error is on held-out windows, or on all
    without held-out windows. The cost of bits alone is forecast from all windows (`convexprune.quantizers._forecast`).
    The default pruner is SparseGPT: quick, and only the shape of a curve matters. So a few rows speak for rows that
    move the loss alike, unless rows share columns or scales, or the weights serve `trials`, too.
    """
    pruner, units = pruner or SparseGPT(), list[Unit]()
    settings = LayerSettings(pruner, DENSE, correction=0, error_target="residual_stream")

    def step(context: LayerContext) -> None:
        context.held_out = held_out
        costs = Survey(patterns, fisher, {pattern for trial in trials for pattern in trial.patterns})
        Pipeline(settings, [Observe(("operator", "residual_stream")), costs])(context)
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
            total, held_out = stack.statistics.total, stack.statistics.held_out
            dense = LayerProblem(stack.weight, total, DENSE, 0.0)
            judge = LayerProblem(stack.weight, held_out, DENSE, 0.0) if held_out.tokens else dense
            operators = dict(zip(stack.names, stack.group.operators, strict=True))
            costs = {name: dict[Constraint, float]() for name in operators}
            forecast = cache(partial(Forecast, dense))
            for pattern in self._patterns:
                fits = [_fits(pattern, *operator.shape) for operator in operators.values()]
                errors = self._errors(stack, pattern, fits, dense, judge, forecast) if any(fits) else ()
                for name, error, fit in zip(operators, errors, fits, strict=False):
                    if fit:
                        costs[name][pattern] = float(error @ self._fisher[name].to(error)) / 2
            width = stack.weight.shape[1]
            self._costs |= {name: (operators[name].shape[0] * width, costs[name]) for name in operators}
            self._powers += sums_of_powers(stack.weight)
            self._scores.append((stack.weight.abs() * total.gram.diagonal().sqrt()).flatten().cpu())

    def _errors(
        self,
        stack: Stack,
        pattern: Constraint,
        fits: Sequence[bool],
        dense: LayerProblem,
        judge: LayerProblem,
        forecast: Callable[[], Forecast],
    ) -> Sequence[Tensor]:
        """Return the errors by row of operators, by forecast for bits alone, and keep the weights of those that fit."""
        heights = [operator.shape[0] for operator in stack.group.operators]
        kinds, kept = tuple(pattern if fit else DENSE for fit in fits), self.weights.get(pattern)
        weights = [row_weights(self._fisher[name]).to(dense.weight) for name in stack.names]

        def pruned(rows: Tensor, problem: LayerProblem) -> Tensor:
            edits = solved([problem], [torch.cat(weights)[rows].sqrt()], stack.pruner)
            return QUANTIZER.quantize(problem, *edits).weight

        if kept is not None:
            whole = torch.arange(sum(heights), device=dense.weight.device)
            weight = pruned(whole, replace(dense, pattern=Stacked(kinds, tuple(heights))))
            parts = zip(stack.group.operators, weight.split(heights), fits, strict=True)
            kept |= {operator: part.to(operator.read().dtype) for operator, part, fit in parts if fit}
        if pattern.grid is not None and pattern.sparsity == 0:
            return forecast().errors(Stacked.alike(pattern, tuple(heights))).double().split(heights)
        most = max(heights) if shares_rows(pattern) else ROWS
        sizes = dense.weight.square() @ dense.gram.diagonal()
        losses = [each * size for each, size in zip(weights, sizes.split(heights), strict=True)]
        firsts = accumulate(heights[:-1], initial=0)
        like = torch.cat([first + alike(each, most) for first, each in zip(firsts, losses, strict=True)])
        some, own = like.unique(), Stacked(kinds, tuple(min(most, height) for height in heights))
        found = judge.rows(some, own).squared_error(pruned(some, dense.rows(some, own)))
        return by_size(found, some, like, sizes).double().split(heights)

    def units(self) -> list[Unit]:
        """Return a unit by operator of the layer, with outliers and skewness of the layer."""
        if not self._costs:
            return []
        outliers, skewed = share_of_outliers(torch.cat(self._scores)), skewness(self._powers)
        return [Unit(name, size, costs, outliers, skewed) for name, (size, costs) in self._costs.items()]


def alike(losses: Tensor, most: int) -> Tensor:
    """Return for each row [m] the number of a row of like loss: at most so many numbers."""
    order = losses.argsort()
    like = torch.empty_like(order)
    for part in order.tensor_split(min(len(order), most)):
        like[part] = part[len(part) // 2]
    return like


def by_size(found: Tensor, some: Tensor, like: Tensor, sizes: Tensor) -> Tensor:
    """Return errors of all rows [m]: those `found` of some rows [k], and others in proportion to rows `like` them."""
    shares = torch.zeros_like(sizes)
    shares[some] = (found / sizes[some]).where(sizes[some] > 0, 0.0)
    errors = sizes * shares[like]
    errors[some] = found
    return errors


def _fits(pattern: Constraint, rows: int, columns: int) -> bool:
    """Return True if an operator can have a pattern: few rows have no room for scales."""
    try:
        pattern.check(rows, columns)
    except PatternError:
        return False
    return True
