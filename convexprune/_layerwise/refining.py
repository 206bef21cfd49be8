"""Ways to lower the output error of a layer by moving its kept values."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune._layerwise.layer_error import LayerError, Values

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
        """See `AbstractWay.candidates`."""
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
        """See `AbstractWay.candidates`."""
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
