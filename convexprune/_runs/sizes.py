"""The sizes that decide the cost of a run: of method, model and settings."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from convexprune._layerwise.statistics import many_at_once


class Method(NamedTuple):
    """The needs of a method for a stack [m n].

    `squares` matrices [n n] and `rectangles` [m n] of float32 live at the peak, beside the moments, and `apart` of the
    tallest operator's shape, if operators are solved singly (counted by torch's allocator, tests/unit/test_cost.py).
    `products` [m n] x [n n] are counted on real layers, with the refit's (lab/benchmarks.md); `factorisations` are n^3
    operations in Cholesky factors and the like. `overhead` is measured time over the time of this arithmetic at the
    rate of a bare product (benchmarks/layer.py). Both stay constants: a group that is pruned here in a second is so
    narrow that extrapolated times were 1.2 to 2.7 times the true times.
    """

    squares: float
    rectangles: float
    products: float
    factorisations: float
    overhead: float
    apart: float = 0.0


METHODS = {
    "admm": Method(7.3, 28.2, 125, 18, 2.3),
    "alps": Method(10.5, 30.7, 45, 12, 4.0),
    "convex": Method(6.9, 28.4, 94, 8, 1.8),
    "fistapruner": Method(5.7, 12.9, 126, 2, 3.0, apart=12.9),
    "magnitude": Method(5.0, 7.9, 0, 0, 1.0),
    "osscar": Method(6.4, 8.0, 5, 8, 8.0),
    "reap": Method(5.0, 7.9, 0, 0, 1.0),
    "shortgpt": Method(5.0, 7.9, 0, 0, 1.0),
    "sparsegpt": Method(4.5, 7.9, 1, 2, 8.0),
    "wanda": Method(5.0, 7.9, 0, 0, 1.0),
    "wanda-sp": Method(5.0, 7.9, 0, 0, 1.0),
}
SCALED = 1  # matrix [m n] more at the peak, if rows are weighed; what they were scaled to is gone by the next one
REFIT = Method(8.3, 29.2, 60, 2, 3.0)


def method_cost(name: str, refit: bool, weighed: bool = False) -> Method:
    own = METHODS[name]
    own = own._replace(rectangles=own.rectangles + SCALED * weighed)
    if not refit:
        return own
    return own._replace(
        squares=max(own.squares, REFIT.squares),
        rectangles=max(own.rectangles, REFIT.rectangles),
        products=own.products + REFIT.products,
        factorisations=own.factorisations + REFIT.factorisations,
        overhead=(own.overhead * own.products + REFIT.overhead * REFIT.products) / (own.products + REFIT.products),
    )


@dataclass(frozen=True)
class Stack:
    names: tuple[str, ...]
    heights: tuple[int, ...]
    inputs: int
    token_aligned: bool = True
    share: float = 1.0  # the fraction of the tokens that reaches the operators

    @property
    def outputs(self) -> int:
        return sum(self.heights)


@dataclass(frozen=True)
class LayerSize:
    stages: tuple[tuple[Stack, ...], ...]
    parameters: int
    largest: int  # parameters of the largest tensor
    count: int  # number of such layers

    @property
    def stacks(self) -> list[Stack]:
        return list(chain.from_iterable(self.stages))


@dataclass(frozen=True)
class ModelSize:
    layers: tuple[LayerSize, ...]
    fixed: int
    largest_fixed: int  # parameters of the largest tensor outside the decoder layers
    hidden: int  # width of the hidden states
    itemsize: int  # bytes of a parameter
    whole: bool = False

    @property
    def bytes(self) -> int:
        return self.itemsize * (self.fixed + sum(layer.count * layer.parameters for layer in self.layers))


@dataclass(frozen=True)
class Setting:
    samples: int
    held_out: int
    length: int
    batch: int
    method: Method
    correction: bool = True  # True if errors of earlier operators are corrected
    dense_prefix: bool = True  # True if layers get the hidden states of the dense network
    bound: bool = False
    gradients: int = 0  # number of windows for gradients
    side_by_side: bool = False  # True if a GPU solves problems of equal shape together
    input_errors: bool = False  # True if the errors of all inputs are counted (`AbstractQuantizer`)

    @property
    def tokens(self) -> int:
        return (self.samples + self.held_out) * self.length

    def corrects(self, stage: int, stack: Stack) -> bool:
        return self.correction and stack.token_aligned and (stage > 0 or not self.dense_prefix)

    def together(self, stack: Stack, stage: Iterable[Stack]) -> int:
        alike = sum((s.outputs, s.inputs) == (stack.outputs, stack.inputs) for s in stage)
        return min(many_at_once(stack.outputs, stack.inputs), alike) if self.side_by_side else 1
