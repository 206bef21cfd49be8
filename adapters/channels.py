"""Channels of a model that may change places: which axes of which parameters have to be ordered alike, by experiment.

Nothing is known of any architecture. What is tried on a decoder layer, and kept only if the layer then computes the
same: the channels between an operator and those before it whose outputs reach it one by one (inside of an MLP; inside
of an attention head), and those of the hidden states, through the whole model.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from convexprune.model import AbstractOperator, Call, DecoderLayer, Group
from convexprune.pipeline import stage_inputs

from .discovery import make_of, signature
from .huggingface import HuggingFaceModel
from .operators import ParameterOperator

TOLERANCE = 1e-3
"""Relative, in float32, and eight roundings in others: to tell another order of a sum from another function."""


HIDDEN = "hidden states"
"""The name of the channels that go through the whole model."""


Inputs = Mapping[Group, Tensor]
"""What groups see."""


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

    def of(self, module: nn.Module) -> Tensor:
        """The parameter, or the matrix of the pile."""
        whole = module.get_parameter(self.parameter)
        return whole if self.index is None else whole[self.index]


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
            part = axis.of(module).narrow(axis.dim, axis.start, self.size)
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
def hidden_channels(model: HuggingFaceModel) -> Channels:
    """Those of the hidden states, from the embedding to the head.

    What lies outside of the decoder layers is not tried here: the model's own outputs tell.

    Raises:
        NotPermutable: they are not to be found, or more than text becomes hidden states.
    """
    hidden, calls = model.probe()
    size = hidden.shape[-1]
    outside = _outside(model)
    known: dict[object, Channels] = {}
    every = []
    for layer, call in zip(model.layers, calls, strict=True):
        key = signature(layer.module)
        if key not in known:
            known[key] = _through(layer, call, hidden)
        every.append(known[key].inside(layer.name))
    axes = [Axis(name, p.dim() - 1) for name, p in outside.items() if p.shape[-1] == size]
    axes += [Axis(name, 0) for name, p in outside.items() if p.dim() > 1 and p.shape[0] == size != p.shape[-1]]
    axes += chain.from_iterable(one.axes for one in every)
    return Channels(HIDDEN, size, tuple(axes), tuple(chain.from_iterable(one.consumers for one in every)))


def _outside(model: HuggingFaceModel) -> dict[str, nn.Parameter]:
    """The parameters outside of the decoder layers, all of which have to be used for text."""
    within = tuple(f"{layer.name}." for layer in model.layers)
    outside = {name: p for name, p in model.model.named_parameters() if not name.startswith(within)}
    used = set[str]()
    with ExitStack() as hooks:
        for path in {name.rpartition(".")[0] for name in outside}:
            called = partial(lambda path, *_: used.add(path), path)
            hook = model.model.get_submodule(path).register_forward_pre_hook(called)
            hooks.callback(hook.remove)
        model.model(model.probe_tokens(), use_cache=False)
    for name in outside:
        if name.rpartition(".")[0] not in used:
            raise NotPermutable(f"text does not pass {name}, and what does may become hidden states, too")
    return outside


# ---- inside of a layer


def _head_size(model: HuggingFaceModel) -> int:
    """The channels that an attention head makes; of a model without heads, those of the hidden states."""
    text = model.model.config.get_text_config()
    named = getattr(text, "v_head_dim", None) or getattr(text, "head_dim", None)
    return named or text.hidden_size // getattr(text, "num_attention_heads", 1)


Source = tuple[AbstractOperator, int]
"""An operator, and where its outputs begin that are a set of channels."""


def _inside(layer: DecoderLayer, call: Call, hidden: Tensor, head: int) -> Iterator[Channels]:
    for number, stage in enumerate(layer.stages):
        earlier = [group for group in chain(*layer.stages[:number])]
        paired = [operator for group in earlier if group.paired for operator in group.operators]
        for group in stage:
            for size in (group.operators[0].shape[1], head) if group.paired else ():
                found = _coupled(layer, group, paired, call, hidden, size)
                sets = [_channels(group, size, reached, sources) for reached, sources in found.items()]
                if sets and _same(layer, group, sets, call, hidden):
                    yield from sets
                    break
        yield from _in_experts(layer, earlier, stage, call, hidden)


def _in_experts(
    layer: DecoderLayer, earlier: Sequence[Group], stage: Sequence[Group], call: Call, hidden: Tensor
) -> Iterator[Channels]:
    """Those inside of the experts of a stage: tried on one that tokens reach, and the same in its siblings."""
    makes: dict[str, dict[str, Group]] = {}
    for group in stage:
        if not group.paired:
            make, number = _make(layer, group.operators[0])
            makes.setdefault(make, {})[number] = group
    before = {_make(layer, o): o for group in earlier if not group.paired for o in group.operators}
    for groups in makes.values():
        seen = stage_inputs(layer, list(groups.values()), call, hidden)
        tried = next((number for number, group in groups.items() if group in seen), None)
        if tried is None:
            continue
        group = groups[tried]
        size = group.operators[0].shape[1]
        found = _coupled(layer, group, [o for (_, n), o in before.items() if n == tried], call, hidden, size)
        if not found or not _same(
            layer, group, [_channels(group, size, *each) for each in found.items()], call, hidden
        ):
            continue
        for number, sibling in groups.items():
            for reached, sources in found.items():
                own = [(before[_make(layer, operator)[0], number], start) for operator, start in sources]
                yield _channels(sibling, size, reached, own)


def _make(layer: DecoderLayer, operator: AbstractOperator) -> tuple[str, str]:
    assert isinstance(operator, ParameterOperator)
    return make_of(layer.module, operator.place)


def _coupled(
    layer: DecoderLayer, group: Group, earlier: Sequence[AbstractOperator], call: Call, hidden: Tensor, size: int
) -> dict[tuple[int, ...], list[Source]]:
    """For blocks of `size` inputs of the group, by their numbers: the outputs that reach these one by one."""
    sources: dict[tuple[int, ...], list[Source]] = {}
    if group.operators[0].shape[1] % size == 0:
        for operator in earlier:
            for start in range(0, operator.shape[0] - size + 1, size):
                reached = _reached(layer, group, operator, slice(start, start + size), call, hidden)
                if reached:
                    sources.setdefault(reached, []).append((operator, start))
    return sources


def _channels(group: Group, size: int, reached: tuple[int, ...], sources: Sequence[Source]) -> Channels:
    axes = tuple(axis for operator, start in sources for axis in _rows(operator, start))
    consumers = tuple(_columns(operator, block * size) for operator in group.operators for block in reached)
    name = group.operators[0].name
    return Channels(
        name if size == group.operators[0].shape[1] else f"{name}[{reached[0] * size}]", size, axes, consumers
    )


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
    assert isinstance(operator, ParameterOperator)
    held = [replace(axis, parameter=axis.parameter.rpartition(".")[2]).of(operator.module) for axis in axes]
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


def _through(layer: DecoderLayer, call: Call, hidden: Tensor) -> Channels:
    """The axes of the hidden states in a layer; of its vectors either all that are as long, or those of its own norms.

    Raises:
        NotPermutable: it computes something else with them in another order.
    """
    size = hidden.shape[-1]
    known = {axis.parameter for operator in layer.operators for axis in (*_rows(operator, 0), _columns(operator, 0))}
    others = {n: p for n, p in layer.module.named_parameters() if n not in known and p.shape[-1] == size}
    for depth in (max((name.count(".") for name in others), default=0), 1):  # OLMo's norms of q and k are deeper
        vectors = [Axis(n, p.dim() - 1) for n, p in others.items() if p.dim() > 1 or n.count(".") <= depth]
        found = _with_vectors(layer, call, hidden, vectors)
        if found is not None:
            return found
    raise NotPermutable(f"{layer.name} computes something else with them in another order")


def _with_vectors(layer: DecoderLayer, call: Call, hidden: Tensor, vectors: Sequence[Axis]) -> Channels | None:
    """The axes found stage by stage, with the hidden states and what is found of the layer in another order.

    What a group then sees is in that order too, so its columns have to be; or as before, so its rows have to be if
    they are as many, for what they make is added to the hidden states. None if neither, or if the layer then computes
    something else.
    """
    size = hidden.shape[-1]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).to(hidden.device)
    expected = call(layer.module, hidden)
    before = {g: x for stage in layer.stages for g, x in stage_inputs(layer, stage, call, hidden).items()}
    found = [Channels(HIDDEN, size, tuple(vectors), ())]  # norms, and routers
    found[0].order(layer.module, order)
    try:
        for stage in layer.stages:
            seen = stage_inputs(layer, stage, call, hidden[..., order])
            one = _of_stage(layer, stage, before, seen, order)
            if one is None:
                return None
            one.order(layer.module, order)
            found.append(one)
        same = close(expected[..., order], call(layer.module, hidden[..., order]), hidden.dtype)
    finally:
        for one in found:
            one.order(layer.module, order.argsort())
    axes = tuple(chain.from_iterable(one.axes for one in found))
    return Channels(HIDDEN, size, axes, tuple(chain.from_iterable(one.consumers for one in found))) if same else None


def _of_stage(
    layer: DecoderLayer, stage: Sequence[Group], before: Inputs, seen: Inputs, order: Tensor
) -> Channels | None:
    """The axes of the groups of a stage, by what they saw before, and see now."""
    axes, consumers = list[Axis](), list[Axis]()
    roles: dict[str, bool | None] = {}  # of an expert that no token reaches, its siblings'
    for group in sorted(stage, key=lambda group: group not in seen):
        make, _ = _make(layer, group.operators[0])
        if group in seen and group in before:
            roles[make] = _reads(before[group], seen[group], order)
        reads = roles.get(make)
        if reads is None:
            return None
        if reads:
            consumers += [_columns(operator, 0) for operator in group.operators]
        else:
            axes += chain.from_iterable(_rows(o, 0) for o in group.operators if o.shape[0] == len(order))
    return Channels(HIDDEN, len(order), tuple(axes), tuple(consumers))


def _reads(before: Tensor, now: Tensor, order: Tensor) -> bool | None:
    """Whether what was seen before is now in this order, or (false) as it was; None if neither."""
    if before.shape != now.shape:
        return None
    if before.shape[-1] == len(order) and close(before[..., order], now, before.dtype):
        return True
    return False if close(before, now, before.dtype) else None


# ---- what both need


def close(expected: Tensor, found: Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors are the same but for the roundings of sums in `dtype`."""
    tolerance = max(TOLERANCE, 8 * torch.finfo(dtype).eps)
    return bool((found - expected).float().norm() <= tolerance * expected.float().norm())


def _inputs(layer: DecoderLayer, group: Group, call: Call, hidden: Tensor) -> Tensor:
    return stage_inputs(layer, (group,), call, hidden)[group]


def _rows(operator: AbstractOperator, start: int) -> list[Axis]:
    """The axes of an operator's outputs: of its weight, and of its bias if it has one."""
    assert isinstance(operator, ParameterOperator)
    place, bias = operator.place, getattr(operator.module, "bias", None)
    axes = [Axis(place.path, int(place.transposed), start, place.index)]
    return axes if bias is None or place.index is not None else [*axes, Axis(f"{place.module}.bias", 0, start)]


def _columns(operator: AbstractOperator, start: int) -> Axis:
    assert isinstance(operator, ParameterOperator)
    return Axis(operator.place.path, int(not operator.place.transposed), start, operator.place.index)
