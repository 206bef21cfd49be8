"""The step that moves the kept values of a layer to lower the error of its outputs, and the ways to do so."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from convexprune._layerwise.capture import CachedSubmodule, Recorded, replaying, stage_inputs
from convexprune._layerwise.context import LayerContext, recorded
from convexprune._layerwise.layer_error import Kept, LayerError, OnGrid, Values
from convexprune._layerwise.model import AbstractOperator, Call, Group
from convexprune._layerwise.pipeline import AbstractLayerStep
from convexprune._layerwise.settings import LayerSettings, Refinement
from convexprune._layerwise.stages import massive_token_weights
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

    def target(i: int) -> Tensor:
        return outputs[i].to(device).float()

    def weights_of(i: int) -> Tensor | None:
        each = [batches[i].to(device)] if i < len(batches) else []
        massive = massive_token_weights(target(i)) if settings.error_target == "residual_stream" else None
        each += [] if massive is None else [massive]
        return reduce(torch.mul, each) if each else None

    whole = LayerError(
        context.layer.module, context.calls, {}, {}, inputs,
        target,
        lambda i: target(i) - dense[i].to(device).float(),
        weights_of,
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
    seen = (stage_inputs(context.layer, [group], context.calls(batch), batch)[group] for batch in batches)
    return recorded(seen, context.record())


Candidates = Iterator[tuple[Values, dict[str, float]]]


class AbstractWay(ABC):
    """A way to lower a layer's error."""

    @abstractmethod
    def candidates(self, error: LayerError, numbers: Sequence[int]) -> Candidates:
        """Yield values and facts for the report, after each round of fits to the batches of these numbers."""


@dataclass(frozen=True)
class GaussNewton(AbstractWay):
    """Gauss-Newton steps. Each minimises 1/2 |r + J d|^2 + proximal/2 |x + d|_D^2 over d, by conjugate gradients.

    At x = 0 are the values of the certified solution. D is an estimate of the diagonal of J' J, and preconditions. The
    objective is strongly convex in the metric proximal D, so with its gradient g the duality gap is at most
    |g|_{1/D}^2 / (2 proximal).
    """

    steps: int = 2
    iterations: int = 6
    proximal: float = 0.1
    tolerance: float = 1e-3  # of the gap, over the objective

    def candidates(self, error: LayerError, numbers: Sequence[int]) -> Candidates:
        x, iterations = error.zero(), 0
        for _ in range(self.steps):
            x, made, facts = self._step(error, x, numbers)
            iterations += made
            yield x, facts | {"refine_steps": float(iterations)}

    def _step(self, error: LayerError, x: Values, numbers: Sequence[int]) -> tuple[Values, int, dict[str, float]]:
        """Return the minimiser of the convex problem about x, iterations, and facts."""
        metric = {n: self.proximal * _smoothed(each) for n, each in error.squared_slopes(x, numbers).items()}
        gradient, value = error.gradient(x, numbers)
        left = {n: -(g + metric[n] * x[n]) for n, g in gradient.items()}
        value += sum(float((metric[n] * x[n].square()).sum()) for n in x) / 2
        moved, ready = error.zero(), {n: left[n] / metric[n] for n in x}
        direction, size, made = dict(ready), _dot(left, ready), 0
        first = size
        while made < self.iterations and size / 2 > self.tolerance * value:
            image = error.product(x, direction, numbers)
            image = {n: each + metric[n] * direction[n] for n, each in image.items()}
            length = size / _dot(direction, image)
            moved = {n: each + length * direction[n] for n, each in moved.items()}
            left = {n: each - length * image[n] for n, each in left.items()}
            value -= length * size / 2
            ready = {n: left[n] / metric[n] for n in x}
            after = _dot(left, ready)
            direction = {n: ready[n] + after / size * direction[n] for n in x}
            size, made = after, made + 1
        facts = {"refine_gap": size / 2 / value, "refine_residual": (size / first) ** 0.5} if first else {}
        return {n: x[n] + moved[n] for n in x}, made, facts


@dataclass(frozen=True)
class Adam(AbstractWay):
    """Adam with a rate that falls to zero (Shin et al., EMNLP 2024), in small batches; rates are relative to sizes."""

    epochs: int = 2
    rate: float = 0.003
    tokens: int = 256  # of a step

    def candidates(self, error: LayerError, numbers: Sequence[int]) -> Candidates:
        generator, x = torch.Generator().manual_seed(0), error.zero()
        count = max(1, error.tokens(numbers) // self.tokens)  # of an epoch, the same at all ranks
        optimizer = torch.optim.Adam(x.values(), lr=self.rate, betas=(0.9, 0.95))
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, self.epochs * count)
        for epoch in range(self.epochs):
            order = [numbers[i] for i in torch.randperm(len(numbers), generator=generator).tolist()]
            for step in range(count):
                chosen = order[len(order) * step // count : len(order) * (step + 1) // count]
                for name, gradient in error.gradient(x, chosen)[0].items():
                    x[name].grad = gradient
                optimizer.step()
                falling.step()
            yield {n: each.clone() for n, each in x.items()}, {"refine_steps": float((epoch + 1) * count)}


WAYS: dict[str, type[AbstractWay]] = {"adam": Adam, "gauss-newton": GaussNewton}


def _dot(a: Values, b: Values) -> float:
    return sum(float((a[n] * b[n]).sum(dtype=torch.float64)) for n in a)


def _smoothed(squares: Tensor) -> Tensor:
    """Return the product of row and column means over the mean; no entry is next to zero."""
    mean = squares.mean().clamp_min(torch.finfo(squares.dtype).tiny)
    rows, columns = squares.mean(1, keepdim=True) / mean, squares.mean(0, keepdim=True) / mean
    return mean * (rows * columns).clamp_min(1e-4)
