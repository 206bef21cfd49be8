"""Channels that may change places: axes of parameters which have to be ordered alike.

Which they are is found by experiments, as no architecture is known here: `inner_channels` and `hidden_channels`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from convexprune.model import AbstractOperator, DecoderLayer

from .discovery import canonical_name
from .operators import ParameterOperator

TOLERANCE = 1e-3
"""Relative, in float32, and eight roundings in others: to tell another order of a sum from another function."""

HIDDEN = "hidden states"
"""The name of the channels that go through the whole model."""


class NotPermutable(Exception):
    """Why channels have to stay in their order."""


@dataclass(frozen=True)
class Axis:
    """The entries from `start` on of dimension `dim` of a parameter, named from the layer or from the model.

    Of a pile of matrices, those of number `index`.
    """

    parameter: str
    dim: int
    start: int = 0
    index: int | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """The parameter, or the matrix of the pile."""
        return parameter if self.index is None else parameter[self.index]

    @torch.no_grad()
    def order(self, parameter: Tensor, order: Tensor) -> None:
        """Put the entries in this order."""
        part = self.of(parameter).narrow(self.dim, self.start, len(order))
        part.copy_(part.index_select(self.dim, order.to(part.device)))


@dataclass(frozen=True)
class Channels:
    """Channels that may change places: with all axes ordered alike the model computes the same.

    `consumers` are the axes that are inputs of operators, whose patterns see the order.
    """

    name: str
    size: int
    axes: tuple[Axis, ...]
    consumers: tuple[Axis, ...]

    def order(self, module: nn.Module, order: Tensor) -> None:
        """Put the channels of `module`, from which the axes are named, in this order [size]."""
        for axis in (*self.axes, *self.consumers):
            axis.order(module.get_parameter(axis.parameter), order)

    @contextmanager
    def ordered(self, module: nn.Module, order: Tensor) -> Iterator[None]:
        """Inside, they are in this order [size]."""
        self.order(module, order)
        try:
            yield
        finally:
            self.order(module, order.argsort())

    def of_layer(self, layer: str) -> "Channels":
        """The same, named from the model."""

        def named(axes: Sequence[Axis]) -> tuple[Axis, ...]:
            return tuple(replace(axis, parameter=f"{layer}.{axis.parameter}") for axis in axes)

        return Channels(f"{layer}.{self.name}", self.size, named(self.axes), named(self.consumers))

    def within(self, layers: Sequence[str], within: bool = True) -> "Channels":
        """Of its axes those in these layers, or those that are not."""
        prefixes = tuple(f"{layer}." for layer in layers)

        def chosen(axes: Sequence[Axis]) -> tuple[Axis, ...]:
            return tuple(axis for axis in axes if axis.parameter.startswith(prefixes) is within)

        return replace(self, axes=chosen(self.axes), consumers=chosen(self.consumers))


def close(expected: Tensor, found: Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors are the same but for the roundings of sums in `dtype`."""
    tolerance = max(TOLERANCE, 8 * torch.finfo(dtype).eps)
    return bool((found - expected).float().norm() <= tolerance * expected.float().norm())


def rows(operator: AbstractOperator, start: int) -> list[Axis]:
    """The axes of an operator's outputs: of its weight, and of its bias if it has one."""
    assert isinstance(operator, ParameterOperator)
    place, bias = operator.place, getattr(operator.module, "bias", None)
    axes = [Axis(place.path, int(place.transposed), start, place.index)]
    return axes if bias is None or place.index is not None else [*axes, Axis(f"{place.module}.bias", 0, start)]


def columns(operator: AbstractOperator, start: int = 0) -> Axis:
    """The axis of an operator's inputs from `start` on."""
    assert isinstance(operator, ParameterOperator)
    return Axis(operator.place.path, int(not operator.place.transposed), start, operator.place.index)


def canonical_name_of(layer: DecoderLayer, operator: AbstractOperator) -> tuple[str, str]:
    """See `canonical_name`: an operator's name without the numbers of equal modules, and these numbers."""
    assert isinstance(operator, ParameterOperator)
    return canonical_name(layer.module, operator.place)
