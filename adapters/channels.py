"""Channels of a model that may change places: which axes of which parameters have to be ordered alike, by experiment.

Nothing is known of any architecture. What is tried on a decoder layer, and kept only if the layer then computes the
same: the channels between an operator and those before it whose outputs reach it one by one (inside of an MLP; inside
of an attention head), and those of the hidden states, through the whole model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn

from convexprune.model import AbstractOperator, Call, DecoderLayer, Group
from convexprune.pipeline import stage_inputs

from .discovery import signature
from .huggingface import HuggingFaceModel
from .operators import ParameterOperator

TOLERANCE = 1e-3
"""Relative, in float32, and eight roundings in others: to tell another order of a sum from another function."""


HIDDEN = "hidden states"
"""The name of the channels that go through the whole model."""


@dataclass(frozen=True)
class Axis:
    """The entries from `start` on of dimension `dim` of a parameter, named from the layer or from the model."""

    parameter: str
    dim: int
    start: int = 0


@dataclass(frozen=True)
class Channels:
    """Channels that may change places: with all axes ordered alike the model computes the same.

    `consumers` are the axes that are inputs of operators, whose patterns see the order.
    """

    name: str
    size: int
    axes: tuple[Axis, ...]
    consumers: tuple[Axis, ...]

    @torch.no_grad()
    def order(self, module: nn.Module, order: Tensor) -> None:
        """Put the channels of `module`, from which the axes are named, in this order [size]."""
        for axis in (*self.axes, *self.consumers):
            part = module.get_parameter(axis.parameter).narrow(axis.dim, axis.start, self.size)
            part.copy_(part.index_select(axis.dim, order.to(part.device)))

    def inside(self, layer: str) -> "Channels":
        """The same, named from the model."""

        def named(axes: Sequence[Axis]) -> tuple[Axis, ...]:
            return tuple(replace(axis, parameter=f"{layer}.{axis.parameter}") for axis in axes)

        return Channels(f"{layer}.{self.name}", self.size, named(self.axes), named(self.consumers))


@torch.no_grad()
def inner_channels(model: HuggingFaceModel) -> list[Channels]:
    """Those inside of decoder layers: of each operator whose inputs come from other operators one by one."""
    hidden, calls = model.probe()
    known: dict[object, list[Channels]] = {}
    found = []
    for layer, call in zip(model.layers, calls, strict=True):
        key = signature(layer.module)
        if key not in known:
            known[key] = list(_inside(layer, call, hidden, _head_size(model)))
        found += [channels.inside(layer.name) for channels in known[key]]
    return found


@torch.no_grad()
def hidden_channels(model: HuggingFaceModel) -> Channels | None:
    """Those of the hidden states, from the embedding to the head; None if a decoder layer then computes another thing.

    What lies outside of the decoder layers is not tried here: the model's own outputs tell.
    """
    hidden, calls = model.probe()
    size = hidden.shape[-1]
    known: dict[object, Channels | None] = {}
    every = []
    for layer, call in zip(model.layers, calls, strict=True):
        key = signature(layer.module)
        if key not in known:
            known[key] = _through(layer, call, hidden)
        if (one := known[key]) is None:
            return None
        every.append(one.inside(layer.name))
    within = tuple(f"{layer.name}." for layer in model.layers)
    outside = [(name, p) for name, p in model.model.named_parameters() if not name.startswith(within)]
    axes = [Axis(name, p.dim() - 1) for name, p in outside if p.shape[-1] == size]
    axes += chain.from_iterable(one.axes for one in every)
    return Channels(HIDDEN, size, tuple(axes), tuple(chain.from_iterable(one.consumers for one in every)))


# ---- inside of a layer


def _head_size(model: HuggingFaceModel) -> int:
    """The channels that an attention head makes; of a model without heads, those of the hidden states."""
    text = model.model.config.get_text_config()
    named = getattr(text, "v_head_dim", None) or getattr(text, "head_dim", None)
    return named or text.hidden_size // getattr(text, "num_attention_heads", 1)


def _inside(layer: DecoderLayer, call: Call, hidden: Tensor, head: int) -> Iterator[Channels]:
    for number, stage in enumerate(layer.stages):
        earlier = [o for group in chain(*layer.stages[:number]) if group.paired for o in group.operators]
        for group in stage:
            for size in (group.operators[0].shape[1], head) if group.paired else ():  # experts see too few tokens
                found = list(_coupled(layer, group, earlier, call, hidden, size))
                if found and _same(layer, group, found, call, hidden):
                    yield from found
                    break


def _coupled(
    layer: DecoderLayer, group: Group, earlier: Sequence[AbstractOperator], call: Call, hidden: Tensor, size: int
) -> Iterator[Channels]:
    """Blocks of `size` inputs of the group, those of the same source together, and the outputs that are the source."""
    inputs = group.operators[0].shape[1]
    if inputs % size:
        return
    sources: dict[tuple[int, ...], list[Axis]] = {}  # by the numbers of the blocks that it reaches
    for operator in earlier:
        for start in range(0, operator.shape[0] - size + 1, size):
            reached = _reached(layer, group, operator, slice(start, start + size), call, hidden)
            if reached:
                sources.setdefault(reached, []).extend(_rows(operator, start))
    for reached, axes in sources.items():
        consumers = tuple(_columns(operator, block * size) for operator in group.operators for block in reached)
        name = group.operators[0].name if size == inputs else f"{group.operators[0].name}[{reached[0] * size}]"
        yield Channels(name, size, tuple(axes), consumers)


def _reached(
    layer: DecoderLayer, group: Group, operator: AbstractOperator, outputs: slice, call: Call, hidden: Tensor
) -> tuple[int, ...]:
    """The blocks of the group's inputs that these outputs reach one by one: with half of them doubled, these change."""
    size = outputs.stop - outputs.start
    chosen = torch.rand(size, generator=torch.Generator().manual_seed(outputs.start)) < 0.5
    before = _inputs(layer, group, call, hidden)
    with _doubled(operator, outputs, chosen):
        after = _inputs(layer, group, call, hidden)
    changed = (before != after).flatten(0, -2).any(0).view(-1, size).cpu()
    spread = bool((changed & ~chosen).any())
    return () if spread else tuple(changed.any(1).nonzero().flatten().tolist())


@contextmanager
def _doubled(operator: AbstractOperator, outputs: slice, chosen: Tensor) -> Iterator[None]:
    """Inside, those of the outputs that are chosen are twice what they are: exactly, in any dtype."""
    axes, rows = _rows(operator, 0), chosen.nonzero().flatten() + outputs.start
    held = [_module(operator).get_parameter(axis.parameter.rpartition(".")[2]) for axis in axes]
    kept = [parameter.clone() for parameter in held]
    try:
        for axis, parameter in zip(axes, held, strict=True):
            factors = torch.ones(parameter.shape[axis.dim], dtype=parameter.dtype).index_fill(0, rows, 2)
            shape = [-1 if dim == axis.dim else 1 for dim in range(parameter.dim())]
            parameter.mul_(factors.view(shape).to(parameter.device))
        yield
    finally:
        for parameter, before in zip(held, kept, strict=True):
            parameter.copy_(before)


def _same(layer: DecoderLayer, group: Group, found: Sequence[Channels], call: Call, hidden: Tensor) -> bool:
    """Whether the group's outputs are the same with all these channels in another order."""

    def outputs() -> Tensor:
        x = _inputs(layer, group, call, hidden).float()
        return torch.cat([x @ operator.read().float().T for operator in group.operators], -1)

    before = outputs()
    orders = [torch.randperm(one.size, generator=torch.Generator().manual_seed(i)) for i, one in enumerate(found)]
    for one, order in zip(found, orders, strict=True):
        one.order(layer.module, order)
    after = outputs()
    for one, order in reversed(list(zip(found, orders, strict=True))):  # they may overlap, if not the same
        one.order(layer.module, order.argsort())
    return close(before, after, hidden.dtype)


# ---- through a layer


def _through(layer: DecoderLayer, call: Call, hidden: Tensor) -> Channels | None:
    """The axes of the hidden states, found stage by stage with the hidden states and what is found in another order.

    What a group then sees is in that order too, so its columns have to be; or as before, so its rows have to be if
    they are as many, for what they make is added to the hidden states.
    """
    size = hidden.shape[-1]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).to(hidden.device)
    biases = {axis.parameter for operator in layer.operators for axis in _rows(operator, 0)}
    vectors = [n for n, p in layer.module.named_parameters() if p.shape == (size,) and n not in biases]
    found = Channels(HIDDEN, size, tuple(Axis(name, 0) for name in vectors), ())
    expected, before = call(layer.module, hidden), _stages_see(layer, call, hidden)
    applied = [found]
    found.order(layer.module, order)
    try:
        for stage in layer.stages:
            seen = stage_inputs(layer, stage, call, hidden[..., order])
            axes, consumers = list[Axis](), list[Axis]()
            for group in stage:
                if not group.paired:
                    return None
                x, dense = seen[group], before[group]
                if x.shape[-1] == size and close(dense[..., order], x, hidden.dtype):
                    consumers += [_columns(operator, 0) for operator in group.operators]
                elif close(dense, x, hidden.dtype):
                    axes += chain.from_iterable(_rows(o, 0) for o in group.operators if o.shape[0] == size)
                else:
                    return None
            applied.append(Channels("", size, tuple(axes), tuple(consumers)))
            applied[-1].order(layer.module, order)
        if not close(expected[..., order], call(layer.module, hidden[..., order]), hidden.dtype):
            return None
    finally:
        for one in applied:
            one.order(layer.module, order.argsort())
    axes = tuple(chain.from_iterable(one.axes for one in applied))
    return replace(found, axes=axes, consumers=tuple(chain.from_iterable(one.consumers for one in applied)))


def _stages_see(layer: DecoderLayer, call: Call, hidden: Tensor) -> dict[Group, Tensor]:
    return {g: x for stage in layer.stages for g, x in stage_inputs(layer, stage, call, hidden).items()}


# ---- what both need


def close(expected: Tensor, found: Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors are the same but for the roundings of sums in `dtype`."""
    tolerance = max(TOLERANCE, 8 * torch.finfo(dtype).eps)
    return bool((found - expected).float().norm() <= tolerance * expected.float().norm())


def _inputs(layer: DecoderLayer, group: Group, call: Call, hidden: Tensor) -> Tensor:
    return stage_inputs(layer, (group,), call, hidden)[group]


def _module(operator: AbstractOperator) -> nn.Module:
    assert isinstance(operator, ParameterOperator)
    return operator.module


def _rows(operator: AbstractOperator, start: int) -> list[Axis]:
    """The axes of an operator's outputs: of its weight, and of its bias if it has one."""
    assert isinstance(operator, ParameterOperator)
    place, bias = operator.place, getattr(operator.module, "bias", None)
    axes = [Axis(place.path, int(place.transposed), start)]
    return axes if bias is None else [*axes, Axis(f"{place.module}.bias", 0, start)]


def _columns(operator: AbstractOperator, start: int) -> Axis:
    assert isinstance(operator, ParameterOperator)
    return Axis(operator.place.path, int(not operator.place.transposed), start)
