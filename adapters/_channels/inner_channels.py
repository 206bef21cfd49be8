"""Channels inside decoder layers that may change places, by experiment: in MLPs, attention heads and experts.

Doubled outputs of an operator show the inputs of a later operator that they reach singly. These channels are then tried
in a new order, and kept only if the later operator's outputs stay the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from math import gcd

import torch
from torch import Tensor, nn

from convexprune._layerwise.capture import stage_inputs
from convexprune._layerwise.model import AbstractOperator, Call, DecoderLayer, Group

from .._discovery.family import head_size
from .._discovery.probing import of_each_kind
from .._huggingface import HuggingFaceModel
from .channels import Axis, Channels, canonical_name_of, close, columns, rows

Source = tuple[AbstractOperator, int, int]
"""An operator, where its outputs begin that are a set of channels, and how many in a row make one."""


@torch.no_grad()
def inner_channels(model: HuggingFaceModel) -> list[Channels]:
    """Return the channels inside decoder layers, for operators whose inputs come singly from earlier outputs."""
    head = head_size(model.model.config)
    found = of_each_kind(model, lambda layer, call, hidden: list(_inside(layer, call, hidden, head)))
    each = zip(model.layers, found, strict=True)
    return [channels.of_layer(layer.name) for layer, inside in each for channels in inside]


def _inside(layer: DecoderLayer, call: Call, hidden: Tensor, head: int) -> Iterator[Channels]:
    for number, stage in enumerate(layer.stages):
        earlier = list(chain(*layer.stages[:number]))
        token_aligned = [operator for group in earlier if group.token_aligned for operator in group.operators]
        for group in stage:
            for size in (group.operators[0].shape[1], head) if group.token_aligned else ():
                found = _coupled(layer, group, token_aligned, call, hidden, size)
                sets = [_channels(group, size, reached, sources) for reached, sources in found.items()]
                if sets and same_in_another_order(layer, group, sets, call, hidden):
                    yield from sets
                    break
        yield from _in_experts(layer, earlier, stage, call, hidden)


def _in_experts(
    layer: DecoderLayer, earlier: Sequence[Group], stage: Sequence[Group], call: Call, hidden: Tensor
) -> Iterator[Channels]:
    """Yield the channels inside the experts of a stage: tried on an expert with tokens, and equal in its siblings."""
    families: dict[str, dict[str, Group]] = {}
    for group in stage:
        if not group.token_aligned:
            family, number = canonical_name_of(layer, group.operators[0])
            families.setdefault(family, {})[number] = group
    before = {canonical_name_of(layer, o): o for group in earlier if not group.token_aligned for o in group.operators}
    for groups in families.values():
        seen = stage_inputs(layer, list(groups.values()), call, hidden)
        tried = next((number for number, group in groups.items() if group in seen), None)
        if tried is None:
            continue
        group = groups[tried]
        size = group.operators[0].shape[1]
        found = _coupled(layer, group, [o for (_, n), o in before.items() if n == tried], call, hidden, size)
        tested = [_channels(group, size, *each) for each in found.items()]
        if not found or not same_in_another_order(layer, group, tested, call, hidden):
            continue
        for number, sibling in groups.items():
            for reached, sources in found.items():
                own = [(before[canonical_name_of(layer, o)[0], number], start, block) for o, start, block in sources]
                yield _channels(sibling, size, reached, own)


def _coupled(
    layer: DecoderLayer, group: Group, earlier: Sequence[AbstractOperator], call: Call, hidden: Tensor, size: int
) -> dict[tuple[int, ...], list[Source]]:
    """Return, by block of `size` inputs of the group, the outputs that reach these inputs singly.

    An operator may have more outputs per block: keys beside values, as in MLA. Or outputs that reach an input stand
    side by side: a gate and its value, as in gpt-oss.
    """
    found: dict[tuple[int, ...], list[Source]] = {}
    blocks, rest = divmod(group.operators[0].shape[1], size)
    for operator in earlier if not rest else ():
        step = gcd(size, max(size, operator.shape[0] // blocks))
        for start in range(0, operator.shape[0] - size + 1, step):
            reached = _reached(layer, group, rows(operator, start), size, call, hidden)
            if reached:
                found.setdefault(reached, []).append((operator, start, 1))
        turns, left = divmod(operator.shape[0], size)
        if turns > 1 and not left and all(operator is not each for each, *_ in chain.from_iterable(found.values())):
            reached = _reached(layer, group, rows(operator, 0, turns), size, call, hidden)
            if reached:
                found.setdefault(reached, []).append((operator, 0, turns))
    return _together(found)


def _together(found: Mapping[tuple[int, ...], list[Source]]) -> dict[tuple[int, ...], list[Source]]:
    """Join outputs that reach a common block: they change places together, as a gate of a query head and its values."""
    merged: dict[tuple[int, ...], list[Source]] = {}
    for reached, sources in found.items():
        common = [other for other in merged if not set(other).isdisjoint(reached)]
        sources = [*chain.from_iterable(merged.pop(other) for other in common), *sources]
        merged[tuple(sorted({*reached, *chain.from_iterable(common)}))] = sources
    return merged


def _channels(group: Group, size: int, reached: tuple[int, ...], sources: Sequence[Source]) -> Channels:
    axes = tuple(axis for source in sources for axis in rows(*source))
    consumers = tuple(columns(operator, block * size) for operator in group.operators for block in reached)
    name = group.operators[0].name
    return Channels(
        name if size == group.operators[0].shape[1] else f"{name}[{reached[0] * size}]", size, axes, consumers
    )


def _reached(
    layer: DecoderLayer, group: Group, axes: Sequence[Axis], size: int, call: Call, hidden: Tensor
) -> tuple[int, ...]:
    """Return the blocks of inputs that change singly after doubling half of the outputs."""
    chosen = half(size, axes[0].start)
    changed = changed_inputs(layer, group, axes, chosen, call, hidden).view(-1, size)
    spread = bool((changed & ~chosen).any())
    return () if spread else tuple(changed.any(1).nonzero().flatten().tolist())


def half(size: int, seed: int) -> Tensor:
    """Choose about half of the entries [size], the first among them and, of several, not the last."""
    chosen = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.5
    chosen[-1], chosen[0] = False, True
    return chosen


def changed_inputs(
    layer: DecoderLayer, group: Group, axes: Sequence[Axis], chosen: Tensor, call: Call, hidden: Tensor
) -> Tensor:
    """Return the mask [inputs] of a group's inputs that change if the `chosen` [channels] of the axes are doubled."""
    before = _inputs(layer, group, call, hidden)
    with _doubled(layer.module, axes, chosen):
        after = _inputs(layer, group, call, hidden)
    return (before != after).flatten(0, -2).any(0).cpu()


@contextmanager
def _doubled(module: nn.Module, axes: Sequence[Axis], chosen: Tensor) -> Iterator[None]:
    """Double the chosen entries during a context: exactly, in any dtype."""
    held = [axis.of(module.get_parameter(axis.parameter)) for axis in axes]
    kept = [parameter.clone() for parameter in held]
    try:
        for axis, parameter in zip(axes, held, strict=True):
            doubled = torch.tensor(axis.entries(chosen.nonzero().flatten().tolist()))
            factors = torch.ones(parameter.shape[axis.dim], dtype=parameter.dtype).index_fill(0, doubled, 2)
            shape = [-1 if dim == axis.dim else 1 for dim in range(parameter.dim())]
            parameter.mul_(factors.view(shape).to(parameter.device))
        yield
    finally:
        for parameter, before in zip(held, kept, strict=True):
            parameter.copy_(before)


def same_in_another_order(
    layer: DecoderLayer, group: Group, found: Sequence[Channels], call: Call, hidden: Tensor
) -> bool:
    """Return True if a group's outputs stay the same with all of some channels in a new order."""

    def outputs() -> Tensor:
        x = _inputs(layer, group, call, hidden).float()
        return torch.cat([x @ operator.read().float().T for operator in group.operators], -1)

    before = outputs()
    with ExitStack() as stack:  # undone from the last to the first: they may overlap, if it is not the same
        for i, one in enumerate(found):
            order = torch.randperm(one.size, generator=torch.Generator().manual_seed(i))
            order = order.roll(1) if torch.equal(order, torch.arange(one.size)) else order  # of two, say
            stack.enter_context(one.ordered(layer.module, order))
        return close(before, outputs(), hidden.dtype)


def _inputs(layer: DecoderLayer, group: Group, call: Call, hidden: Tensor) -> Tensor:
    return stage_inputs(layer, (group,), call, hidden)[group]
