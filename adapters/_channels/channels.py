"""Channels that may change places: axes of parameters that have to be ordered alike.

Experiments find the sets, because no architecture is known here: `inner_channels` and `hidden_channels`.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from convexprune._layerwise.model import AbstractOperator, DecoderLayer

from .._discovery.layout import canonical_name
from .._discovery.operators import ParameterOperator

TOLERANCE = 1e-3
"""Relative, in float32, and eight roundings in others: to tell another order of a sum from another function."""

HIDDEN = "hidden states"
"""The name of the channels that go through the whole model."""


class NotPermutable(Exception):
    """The reason why channels have to stay in order."""


@dataclass(frozen=True)
class Axis:
    """Entries along a dimension of a parameter.

    Args:
        parameter: name, from the layer or from the model.
        index: number of the expert, in fused experts.
        block: consecutive entries of a channel; 1: an entry is a channel.
    """

    parameter: str
    dim: int
    start: int = 0
    index: int | None = None
    block: int = 1

    def of(self, parameter: Tensor) -> Tensor:
        """The `parameter`, or the matrix of the expert."""
        return parameter if self.index is None else parameter[self.index]

    @torch.no_grad()
    def order(self, parameter: Tensor, order: Tensor) -> None:
        """Reorder the entries, or blocks of entries.

        Args:
            order: [channels].
        """
        entries = torch.tensor(self.entries(order.tolist()), device=parameter.device) - self.start
        part = self.of(parameter).narrow(self.dim, self.start, len(entries))
        part.copy_(part.index_select(self.dim, entries))

    def entries(self, numbers: Iterable[int]) -> list[int]:
        """Return the positions, along the dimension, of channels with these `numbers`."""
        return [self.start + number * self.block + i for number in numbers for i in range(self.block)]


@dataclass(frozen=True)
class Channels:
    """Channels that may change places: with all axes ordered alike the model's function stays the same.

    Args:
        axes: axes that are no inputs of operators.
        consumers: axes that are inputs of operators, whose patterns depend on the order.
    """

    name: str
    size: int
    axes: tuple[Axis, ...]
    consumers: tuple[Axis, ...]

    def order(self, module: nn.Module, order: Tensor) -> None:
        """Reorder the channels.

        Args:
            order: [size].
        """
        for axis in (*self.axes, *self.consumers):
            axis.order(module.get_parameter(axis.parameter), order)

    @contextmanager
    def ordered(self, module: nn.Module, order: Tensor) -> Iterator[None]:
        """Reorder the channels during a context.

        Args:
            order: [size].
        """
        self.order(module, order)
        try:
            yield
        finally:
            self.order(module, order.argsort())

    def of_layer(self, layer: str) -> "Channels":
        """Return the channels with names from the model; `layer` is the path of the layer."""

        def named(axes: Sequence[Axis]) -> tuple[Axis, ...]:
            return tuple(replace(axis, parameter=f"{layer}.{axis.parameter}") for axis in axes)

        return Channels(f"{layer}.{self.name}", self.size, named(self.axes), named(self.consumers))

    def within(self, layers: Sequence[str], within: bool = True) -> "Channels":
        """Some of the axes."""
        prefixes = tuple(f"{layer}." for layer in layers)

        def chosen(axes: Sequence[Axis]) -> tuple[Axis, ...]:
            return tuple(axis for axis in axes if axis.parameter.startswith(prefixes) is within)

        return replace(self, axes=chosen(self.axes), consumers=chosen(self.consumers))


def close(expected: Tensor, found: Tensor, dtype: torch.dtype) -> bool:
    """Return True if two tensors are equal up to the rounding of sums in `dtype`."""
    tolerance = max(TOLERANCE, 8 * torch.finfo(dtype).eps)
    return bool((found - expected).float().norm() <= tolerance * expected.float().norm())


def rows(operator: AbstractOperator, start: int, block: int = 1) -> list[Axis]:
    """Return the axes of an operator's outputs: of its weight, and of its bias, if any."""
    assert isinstance(operator, ParameterOperator)
    place = operator.place
    axes = [Axis(place.path, int(place.transposed), start, place.index, block)]
    bias = "bias" if place.index is None else f"{place.parameter}_bias"  # that of fused experts, as gpt-oss has it
    if getattr(operator.module, bias, None) is not None:
        axes.append(Axis(f"{place.module}.{bias}", 0, start, place.index, block))
    return axes


def columns(operator: AbstractOperator, start: int = 0) -> Axis:
    """Return the axis of an operator's inputs."""
    assert isinstance(operator, ParameterOperator)
    return Axis(operator.place.path, int(not operator.place.transposed), start, operator.place.index)


def canonical_name_of(layer: DecoderLayer, operator: AbstractOperator) -> tuple[str, str]:
    assert isinstance(operator, ParameterOperator)
    return canonical_name(layer.module, operator.place)
