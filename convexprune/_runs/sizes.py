"""The sizes that decide the cost of a run: of model and settings."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

from convexprune._layerwise.statistics import many_at_once
from convexprune.pruners import Cost


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
    method: Cost
    correction: bool = True  # True if errors of earlier operators are corrected
    dense_prefix: bool = True  # True if layers get the hidden states of the dense network
    bound: bool = False
    gradients: int = 0  # number of windows for gradients
    surveyed: int = 0  # number of windows for a survey of the dense model
    survey: Cost = field(default_factory=Cost)
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
