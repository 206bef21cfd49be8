"""Channels that may change places: axes of parameters that have to be ordered alike, found by experiment."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from convexprune._layerwise.capture import stage_inputs
from convexprune._layerwise.model import AbstractOperator, Call, DecoderLayer, Group

from .._discovery.operators import ParameterOperator, canonical_name
from .._discovery.probing import of_each_kind
from .._huggingface import HuggingFaceModel

TOLERANCE = 1e-3
"""Relative, in float32, and eight roundings in others: to tell another order of a sum from another function."""

HIDDEN = "hidden states"
"""The name of the channels that go through the whole model."""


class NotPermutable(Exception):
    """The reason why channels have to stay in order."""


@dataclass(frozen=True)
class Axis:
    """Entries along a dimension of a parameter."""

    parameter: str  # name, from the layer or from the model
    dim: int
    start: int = 0
    index: int | None = None  # number of the expert, in fused experts
    block: int = 1  # consecutive entries of a channel

    def of(self, parameter: Tensor) -> Tensor:
        """The `parameter`, or the matrix of the expert."""
        return parameter if self.index is None else parameter[self.index]

    @torch.no_grad()
    def order(self, parameter: Tensor, order: Tensor) -> None:
        """Bring the entries, or blocks of entries, into an `order` [channels]."""
        entries = torch.tensor(self.entries(order.tolist()), device=parameter.device) - self.start
        part = self.of(parameter).narrow(self.dim, self.start, len(entries))
        part.copy_(part.index_select(self.dim, entries))

    def entries(self, numbers: Iterable[int]) -> list[int]:
        """Return the positions, along the dimension, of channels with these `numbers`."""
        return [self.start + number * self.block + i for number in numbers for i in range(self.block)]


@dataclass(frozen=True)
class Channels:
    """Channels that may change places: with all axes ordered alike the model's function stays the same."""

    name: str
    size: int
    axes: tuple[Axis, ...]  # that are no inputs of operators
    consumers: tuple[Axis, ...]  # that are inputs of operators, whose patterns depend on the order

    def order(self, module: nn.Module, order: Tensor) -> None:
        """Bring the channels into an `order` [size]."""
        for axis in (*self.axes, *self.consumers):
            axis.order(module.get_parameter(axis.parameter), order)

    @contextmanager
    def ordered(self, module: nn.Module, order: Tensor) -> Iterator[None]:
        """Bring the channels into an `order` [size] during a context."""
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


Inputs = Mapping[Group, Tensor]
"""The inputs of groups."""


@torch.no_grad()
def hidden_channels(model: HuggingFaceModel) -> Channels:
    """Return the channels of the hidden states; outside the layers only the whole model's outputs are the check."""
    outside = _outside(model)
    found = zip(model.layers, of_each_kind(model, _through), strict=True)
    every = [channels.of_layer(layer.name) for layer, channels in found]
    size = every[0].size
    axes = [Axis(name, p.dim() - 1) for name, p in outside.items() if p.shape[-1] == size]
    axes += [Axis(name, 0) for name, p in outside.items() if p.dim() > 1 and p.shape[0] == size != p.shape[-1]]
    axes += chain.from_iterable(one.axes for one in every)
    return Channels(HIDDEN, size, tuple(axes), tuple(chain.from_iterable(one.consumers for one in every)))


def _outside(model: HuggingFaceModel) -> dict[str, nn.Parameter]:
    """Return the parameters outside the decoder layers, all of which have to be used for text."""
    within = tuple(f"{layer.name}." for layer in model.layers)
    outside = {name: p for name, p in model.model.named_parameters() if not name.startswith(within)}
    used = set[str]()
    with ExitStack() as hooks:
        for path in {name.rpartition(".")[0] for name in outside}:
            called = partial(lambda path, *_: used.add(path), path)
            hook = model.model.get_submodule(path).register_forward_pre_hook(called)
            hooks.callback(hook.remove)
        model.logits(model.probe_tokens(), model.probe()[0])  # the layers pass these hidden states on
    for name in outside:
        if name.rpartition(".")[0] not in used:
            raise NotPermutable(f"text does not pass {name}, and what does may become hidden states, too")
    return outside


def _through(layer: DecoderLayer, call: Call, hidden: Tensor) -> Channels:
    """Return the axes of the hidden states in a layer: all its vectors of equal length, or else those of its norms."""
    size = hidden.shape[-1]
    known = {axis.parameter for operator in layer.operators for axis in (*rows(operator, 0), columns(operator, 0))}
    others = {n: p for n, p in layer.module.named_parameters() if n not in known and p.shape[-1] == size}
    for depth in (max((name.count(".") for name in others), default=0), 1):  # OLMo's norms of q and k are deeper
        vectors = [Axis(n, p.dim() - 1) for n, p in others.items() if p.dim() > 1 or n.count(".") <= depth]
        found = _with_vectors(layer, call, hidden, vectors)
        if found is not None:
            return found
    raise NotPermutable(f"{layer.name} computes something else with them in another order")


def _with_vectors(layer: DecoderLayer, call: Call, hidden: Tensor, vectors: Sequence[Axis]) -> Channels | None:
    """Return the axes found by stage, with hidden states and known parts of the layer in a new order.

    If a group's inputs then have the new order, its columns get the new order; if they are unchanged, its rows do if
    there are as many, because its outputs are added to the hidden states. None in all further cases, or if the
    layer's function changes.
    """
    size = hidden.shape[-1]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).to(hidden.device)
    expected = call(layer.module, hidden)
    before = {g: x for stage in layer.stages for g, x in stage_inputs(layer, stage, call, hidden).items()}
    found = [Channels(HIDDEN, size, tuple(vectors), ())]  # norms, and routers
    with ExitStack() as stack:
        stack.enter_context(found[0].ordered(layer.module, order))
        for stage in layer.stages:
            seen = stage_inputs(layer, stage, call, hidden[..., order])
            one = _of_stage(layer, stage, before, seen, order)
            if one is None:
                return None
            stack.enter_context(one.ordered(layer.module, order))
            found.append(one)
        same = close(expected[..., order], call(layer.module, hidden[..., order]), hidden.dtype)
    axes = tuple(chain.from_iterable(one.axes for one in found))
    return Channels(HIDDEN, size, axes, tuple(chain.from_iterable(one.consumers for one in found))) if same else None


def _of_stage(
    layer: DecoderLayer, stage: Sequence[Group], before: Inputs, seen: Inputs, order: Tensor
) -> Channels | None:
    """Return the axes of a stage's groups, by inputs before and after the change."""
    axes, consumers = list[Axis](), list[Axis]()
    roles: dict[str, bool | None] = {}  # of an expert that no token reaches, its siblings'
    for group in sorted(stage, key=lambda group: group not in seen):
        name, _ = canonical_name_of(layer, group.operators[0])
        if group in seen and group in before:
            roles[name] = _reads(before[group], seen[group], order)
        reads = roles.get(name)
        if reads is None:
            return None
        if reads:
            consumers += [columns(operator, 0) for operator in group.operators]
        else:
            axes += chain.from_iterable(rows(o, 0) for o in group.operators if o.shape[0] == len(order))
    return Channels(HIDDEN, len(order), tuple(axes), tuple(consumers))


def _reads(before: Tensor, now: Tensor, order: Tensor) -> bool | None:
    """Return True if inputs appear in the new order, False if unchanged, None otherwise."""
    if before.shape != now.shape:
        return None
    if before.shape[-1] == len(order) and close(before[..., order], now, before.dtype):
        return True
    return False if close(before, now, before.dtype) else None
